"""Kinds of evaluation sets: how each is opened and scored, and the files of published sets."""
