"""Checkpoints: their files, whether a training may resume from them, and how the loop writes them."""
