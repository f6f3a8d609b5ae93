"""Checkpoints: their files, whether a training run may resume from them, and how the loop writes them."""
