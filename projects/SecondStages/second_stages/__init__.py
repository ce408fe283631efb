"""Reference second stages: what reads the proposals and answers.

Plain, small models to measure here, end to end, what better proposals gain; no contenders.
"""
