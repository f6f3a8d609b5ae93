"""``dataset.json``: its content, its checks, its differences from a config, claims."""
