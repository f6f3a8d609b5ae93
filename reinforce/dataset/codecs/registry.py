"""The codecs by their names in configs."""

from __future__ import annotations

import functools
import re

from reinforce.dataset.codecs.base import Codec, FittedCodec
from reinforce.dataset.codecs.plain import First, Plain
from reinforce.dataset.codecs.principal import PrincipalComponents
from reinforce.dataset.codecs.quantisers import ProductQuantiser, ResidualQuantiser
from reinforce.dataset.codecs.standardised import Standardised

CODECS: tuple[type[Codec], ...] = (Plain, First, PrincipalComponents, ProductQuantiser, ResidualQuantiser)


def find_fitted(name: str) -> FittedCodec:
    """The codec that a codebook names. Raises ValueError if there is none."""
    prefix, _, inner = name.rpartition("-")
    codec = Standardised(find_codec(inner)) if prefix == Standardised.prefix else find_codec(name)
    if not isinstance(codec, FittedCodec):
        raise ValueError(f"codec {name!r} has no codebook")
    return codec


@functools.lru_cache
def find_codec(name: str) -> Codec:
    """The codec of a name. Raises ValueError if there is none."""
    for codec in CODECS:
        if re.fullmatch(codec.pattern, name):
            return codec(name)
    raise ValueError(f"there is no codec {name!r}; there are: {'; '.join(codec.example for codec in CODECS)}")
