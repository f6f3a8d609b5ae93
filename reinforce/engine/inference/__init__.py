"""Models on one accelerator: batches, memory, turns, self-test, time."""
