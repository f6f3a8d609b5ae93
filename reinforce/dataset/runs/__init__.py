"""What runs leave in a dataset: records of shards, progress."""
