"""Datasets and samples as a notebook shows them: HTML without scripts that needs no other file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from reinforce.dataset.kinds.registry import stored_layer
from reinforce.dataset.reading.shown_sample import Shown, ShownSample, draw
from reinforce.errors import UserError
from reinforce.markup import picture_address, render

_SIDE, _REPLAY_SIDE = 320, 120  # pixels
_LAYERS = 40  # that are listed


def sample_html(sample: Shown) -> str:
    """A sample: the image with its crops, its augmentations, and its captions with their similarities."""
    shown, original, problem = ShownSample.of(sample), "", ""
    replays: list[str] = []
    try:
        pictures = draw(sample, _SIDE, _REPLAY_SIDE)
        original, replays = picture_address(pictures.original), _parts(pictures.replays, len(shown.replays))
    except UserError as error:
        problem = str(error)
    return render("notebook/sample.html", shown=shown, original=original, replays=replays, problem=problem)


def dataset_html(url: str, facts: Sequence[tuple[str, str]], layers: Mapping[str, Mapping[str, Any]]) -> str:
    """A dataset: facts by name, and the entries in dataset.json of the layers that are read."""
    shown = [stored_layer(name, layers[name]) for name in [*layers][:_LAYERS]]
    lines = [(layer.name, layer.kind.content(layer), layer.fingerprint) for layer in shown]
    return render(
        "notebook/table.html",
        title=url,
        facts=facts,
        heads=("layer", "a row", "fingerprint"),
        lines=lines,
        more=len(layers) - len(shown),
    )


def _parts(strip: bytes, count: int) -> list[str]:
    """Addresses of the squares of a strip, as single images: notebooks may remove the styles that cut it."""
    if not strip:
        return []
    with Image.open(io.BytesIO(strip)) as image:
        side = image.height
        parts = [image.crop((k * side, 0, (k + 1) * side, side)) for k in range(count)]
    found = []
    for part in parts:
        out = io.BytesIO()
        part.save(out, "WEBP", quality=85, method=2)
        found.append(picture_address(out.getvalue()))
    return found
