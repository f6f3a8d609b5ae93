"""``reinforce validate`` and ``--repair``."""
