"""One shard at a time: rows, models, tables, commit."""
