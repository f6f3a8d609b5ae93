"""Teachers of open_clip."""
