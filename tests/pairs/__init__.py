"""Whole runs and trainings drawn by covering arrays, and what must be true of each; see CONTRIBUTING.md."""
