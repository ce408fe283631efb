"""The ablations on RefShapes: every config with several seeds, and the tables of them."""
