"""One loop for everything that is trained: students and captioners."""
