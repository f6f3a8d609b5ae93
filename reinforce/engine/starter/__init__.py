"""``reinforce init``: a config for a source."""
