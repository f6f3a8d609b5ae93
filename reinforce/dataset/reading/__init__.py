"""``reinforce.open``: aligned layers, samples, and how they are shown."""
