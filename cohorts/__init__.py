"""Predictions of many scans: which ones are meant, how they are worked through, and the tables of what came out."""
