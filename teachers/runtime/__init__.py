"""Runtime of models, for all packages: device, precision, determinism, memory, counted operations."""
