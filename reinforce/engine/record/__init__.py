"""What a run records: events, totals and summary, rates, metrics, progress."""
