"""Rerank a detector's results file for all queries of a data set, as tools/rerank.py runs it."""
