"""Augmentation records, and the backends that replay them."""
