"""The rows of a shard, decoded and augmented ahead in processes. Loads no torch in these."""
