"""CoCa captioners of open_clip."""
