"""Outputs that others have published: nothing is loaded."""
