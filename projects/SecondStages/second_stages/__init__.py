"""Reference second stages: small models that read proposals, to measure the gain end to end."""
