"""Producers: how the layers of each kind are computed, refused and written."""
