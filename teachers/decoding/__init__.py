"""From next-token logits to captions."""
