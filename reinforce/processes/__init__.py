"""Cores, shared memory, threads and signals of processes."""
