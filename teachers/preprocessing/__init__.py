"""From RGB pixels to the input of a model."""
