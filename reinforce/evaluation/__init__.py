"""Evaluation of image-text models: zero-shot classification and retrieval."""
