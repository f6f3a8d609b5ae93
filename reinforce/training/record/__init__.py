"""Records of a training run: logs, curves, trackers, progress, evaluations, results."""
