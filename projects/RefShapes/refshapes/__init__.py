"""The generator of RefShapes: layouts, drawing, referring expressions and captions."""
