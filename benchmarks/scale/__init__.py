"""The control plane at the size of DFN-5B and beyond: planning, the start of a training, and a simulated cluster."""
