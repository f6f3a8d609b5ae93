"""Records of runs in a dataset: shards, progress."""
