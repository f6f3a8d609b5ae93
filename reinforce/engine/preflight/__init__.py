"""What is checked and estimated before a run: source, models, machines, bytes, hours."""
