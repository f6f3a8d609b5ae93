"""The terms of a student's loss: one file for each."""
