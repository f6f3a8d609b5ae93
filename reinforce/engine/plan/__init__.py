"""Which layers each shard lacks. Loads neither torch nor Ray."""
