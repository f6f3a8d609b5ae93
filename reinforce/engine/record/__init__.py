"""Records of a run: events, totals and summary, rates, metrics, progress."""
