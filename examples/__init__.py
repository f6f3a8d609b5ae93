"""Programs that use reinforce, and are not part of the wheel."""
