"""Leases shards to workers until all are finished or quarantined."""
