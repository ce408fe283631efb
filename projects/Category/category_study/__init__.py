"""How Category was made: the tagger's training, calibration and cross-validation."""
