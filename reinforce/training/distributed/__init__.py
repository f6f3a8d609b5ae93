"""Processes that train together: how they start, gather rows, watch each other, and run on Ray Train."""
