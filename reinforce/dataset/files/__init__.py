"""Layer files: paths, listings, reading, writing, damage."""
