"""Codecs: how vectors are stored and decoded. One file for each sort, and a registry."""
