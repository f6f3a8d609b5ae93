"""The formats of sources: one file for each."""
