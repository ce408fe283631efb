"""RefShapes: scenes, how they are drawn, what is said of them, and the files."""
