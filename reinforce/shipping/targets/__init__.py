"""Runtimes that models are exported for: one file for each, listed in ``shipping/packages.py``."""
