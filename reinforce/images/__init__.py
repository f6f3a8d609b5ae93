"""The image policy: encoded bytes to RGB, or a reason."""
