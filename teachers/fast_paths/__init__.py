"""Models made fast: fixed weights, fp8, compiled blocks, CUDA graphs."""
