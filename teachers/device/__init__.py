"""Device, precision, determinism, CUDA graphs, fast towers."""
