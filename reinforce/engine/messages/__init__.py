"""What driver and workers send each other: tasks, results, pulses, errors with their frames."""
