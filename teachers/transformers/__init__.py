"""Teachers and captioners of transformers."""
