"""Scorers: numbers for each sample, computed from what is stored of it."""
