"""Kinds of layers: one file for each, or for two that share their files' form, and a registry."""
