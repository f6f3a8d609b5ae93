"""Fine-tuning of CoCa captioners on images with captions."""
