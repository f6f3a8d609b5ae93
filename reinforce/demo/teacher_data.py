"""What the demo's models learn from: eight styles, and of OpenMoji three quarters of the concepts alone.

The recipes train on three of them, Twemoji, OpenMoji and Noto; the captions of all make the vocabulary.
"""

from __future__ import annotations

import random
from pathlib import Path

from reinforce.demo import icon_sets
from reinforce.demo.concepts import Concept
from reinforce.demo.data import picture, shared_concepts, write_pictures
from reinforce.demo.styles import credits, openmoji, twemoji
from reinforce.seeds import seed_for

#: Half of the captions name the picture, half add or put first some of its keywords.
_TEMPLATES = (
    "{name}",
    "{phrase}",
    "an emoji of {phrase}",
    "{name}, {keywords}",
    "{keywords}, {name}",
    "a picture of {phrase}, {keywords}",
)


def write_lessons(out: str | Path, fetched: str | Path) -> list[Path]:
    """Write shards of each style into ``out``/STYLE, with what npm brings kept in ``fetched``; see ``write_shards``.

    A concept's caption differs from style to style; ``phrase`` in the sidecar is the clean one. Raises UserError.
    """
    folder = Path(fetched)
    icon_sets.fetch(folder)
    styles = {"twemoji": (twemoji(), credits("twemoji")), "openmoji": (openmoji(), credits("openmoji"))}
    styles |= {name: (icon_sets.drawings(folder, name), icon_sets.credits(name)) for name in icon_sets.ICON_SETS}
    words, every = icon_sets.keywords(folder), {concept.emoji.key: concept for concept in shared_concepts()}
    paths = []
    for style, (drawings, notice) in styles.items():
        drawn = (
            picture(concept, drawings[key](), _caption(style, concept, words.get(key, [])), f"{key}-{style}")
            for key, concept in every.items()
            if key in drawings and not (style == "openmoji" and concept.unseen)
        )
        paths += write_pictures(Path(out) / style, drawn, notice)
    return paths


def _caption(style: str, concept: Concept, keywords: list[str]) -> str:
    drawn = random.Random(seed_for(0, f"{style} {concept.emoji.key}", "caption"))  # noqa: S311 (words, no secrets)
    some = drawn.sample(keywords, min(3, len(keywords))) or [concept.group.replace("-", " ")]
    return drawn.choice(_TEMPLATES).format(name=concept.name, phrase=concept.emoji.phrase, keywords=", ".join(some))
