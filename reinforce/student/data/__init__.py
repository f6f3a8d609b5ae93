"""Batches from reinforced datasets: streamed, shuffled, divided among ranks, resumable."""
