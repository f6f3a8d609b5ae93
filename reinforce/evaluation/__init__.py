"""Judging image-text models: zero-shot classification and retrieval."""
