"""Maps over shards in several processes or on Ray, and the shuffle of records between two maps."""
