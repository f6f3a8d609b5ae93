"""Suites of published evaluations: DataComp's 38 sets, their metrics, and what is published of released models."""
