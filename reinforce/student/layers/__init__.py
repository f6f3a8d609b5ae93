"""How layers of a student compute in training: rounded, merged, or around a fault of a library."""
