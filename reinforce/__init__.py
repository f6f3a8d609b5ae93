"""Multi-modal dataset reinforcement: image-text shards in, layers of Parquet out, students trained from them."""
