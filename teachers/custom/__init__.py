"""Models that are, or can be, classes of the user's."""
