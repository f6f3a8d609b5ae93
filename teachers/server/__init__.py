"""Captioners behind servers that speak the chat completions protocol."""
