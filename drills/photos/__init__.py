"""``make adapt-photos``: a model of released weights adapted to real photos; none of both is in the repository."""
