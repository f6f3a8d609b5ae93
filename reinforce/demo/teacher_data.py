"""Training data of the demo's teachers and captioner: shards in ten styles.

OpenMoji is included for three quarters of the concepts only. styles-64 is trained on all styles, the other teachers and
the captioner on three, Twemoji, OpenMoji and Noto; the vocabulary is built from the captions of all.
"""

from __future__ import annotations

import random
from pathlib import Path

from reinforce.demo import icon_sets
from reinforce.demo.concepts import Concept
from reinforce.demo.data import make_picture, shared_concepts, write_pictures
from reinforce.demo.styles import credits_text, openmoji, twemoji
from reinforce.seeds import seed_for

#: Half of the templates only name the picture, half also have some of its keywords.
_TEMPLATES = (
    "{name}",
    "{phrase}",
    "an emoji of {phrase}",
    "{name}, {keywords}",
    "{keywords}, {name}",
    "a picture of {phrase}, {keywords}",
)


def write_teacher_data(out: str | Path, fetched: str | Path) -> list[Path]:
    """Write shards of each style to ``out``/STYLE, in the format of ``write_shards``; return their paths.

    The npm packages are cached in ``fetched``. A concept's caption differs between styles; ``phrase`` in the sidecar is
    the noun phrase alone. Raises UserError.
    """
    folder = Path(fetched)
    icon_sets.fetch_packages(folder)
    styles = {"twemoji": (twemoji(), credits_text("twemoji")), "openmoji": (openmoji(), credits_text("openmoji"))}
    styles |= {
        name: (icon_sets.read_drawings(folder, name), icon_sets.credits_text(name)) for name in icon_sets.ICON_SETS
    }
    keywords = icon_sets.read_keywords(folder)
    concepts = {concept.emoji.key: concept for concept in shared_concepts()}
    paths = []
    for style, (drawings, notice) in styles.items():
        pictures = (
            make_picture(concept, drawings[key](), _caption(style, concept, keywords.get(key, [])), f"{key}-{style}")
            for key, concept in concepts.items()
            if key in drawings and not (style == "openmoji" and concept.unseen)
        )
        paths += write_pictures(Path(out) / style, pictures, notice)
    return paths


def _caption(style: str, concept: Concept, keywords: list[str]) -> str:
    rng = random.Random(seed_for(0, f"{style} {concept.emoji.key}", "caption"))  # noqa: S311 (not for security)
    some = rng.sample(keywords, min(3, len(keywords))) or [concept.group.replace("-", " ")]
    return rng.choice(_TEMPLATES).format(name=concept.name, phrase=concept.emoji.phrase, keywords=", ".join(some))
