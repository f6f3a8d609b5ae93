"""What a training records: logs, curves, trackers, progress, evaluations, results."""
