"""The web demo: scenes of boxes, answers to queries, and the page that shows them."""
