"""Models that label: teachers and captioners. Imports nothing of ``reinforce``."""
