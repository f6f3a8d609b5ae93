"""How layers are computed: ``reinforce.run``."""
