"""Bounded reading of untrusted Parquet: footers, page headers, delta-encoded pages."""
