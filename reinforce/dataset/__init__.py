"""Reinforced datasets: layers and their files, the manifest, augmentation records, vectors, and reading."""
