"""Layers: their fingerprints, and how they are dropped."""

from __future__ import annotations

from reinforce.dataset.kinds.registry import drop_command
from reinforce.dataset.layers import compute_fingerprint


def test_a_fingerprint_depends_on_content_and_not_on_order() -> None:
    assert compute_fingerprint({"seed": 0, "images": "embed"}) == compute_fingerprint({"images": "embed", "seed": 0})
    assert compute_fingerprint({"seed": 0}) != compute_fingerprint({"seed": 1})
    # If this one changes, no existing dataset can be extended any more.
    assert compute_fingerprint({"seed": 0, "images": "embed"}) == "389e7ca116e06093"


def test_the_command_has_a_pattern_only_where_all_layers_of_a_teacher_are_named() -> None:
    images, caption = "embeddings/a/images", "embeddings/a/caption"
    assert drop_command("my data", [images, caption], [images, caption]) == "reinforce drop 'my data' 'embeddings/a/*'"
    assert drop_command("d", [images], [images, caption]) == f"reinforce drop d {images}"
    assert drop_command("d", [images], [images]) == f"reinforce drop d {images}"
    assert drop_command("d", ["captions/c"], ["captions/c", "captions/d"]) == "reinforce drop d captions/c"
    assert drop_command("d", ["samples", images], ["samples", images]) == "reinforce drop d '*'"
