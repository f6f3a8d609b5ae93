"""Grids of patch vectors of image towers."""
