"""Steps before the first one, which leave no trace: what fits in memory, and whether compiled code computes it."""
