"""What captioners and teachers of every family have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from teachers.registry import load_model, teacher_spec
from tests.helpers.models import tiny_captioners
from tests.helpers.models.tiny_captioners import Captioners, captioned, pictures, pixels_of, seeds

KINDS = ["coca", *tiny_captioners.IMAGE_TO_TEXT, *tiny_captioners.CHAT]


def check_independent(captioner: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Check that captions depend on neither the batch nor the rows that are decoded together; return them."""
    pixels, all_seeds = pixels_of(pictures(count), captioner.image), seeds(count, captioner.captions)
    together: list[list[str]] = captioner.caption(pixels, all_seeds)
    for i in (0, count - 1):
        assert captioner.caption(pixels[i : i + 1], all_seeds[i : i + 1]) == [together[i]]
    with monkeypatch.context() as patch:
        patch.setattr("teachers.coca.captioner._MAX_ROWS", 7)
        patch.setattr(captioner, "_rows", 7, raising=False)
        assert captioner.caption(pixels, all_seeds) == together
    return together


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_depends_only_on_its_image_and_seed(
    build_captioner: Captioners, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner: Any = build_captioner(kind, captions=3, min_length=0, max_length=9, temperature=2.0)
    together = check_independent(captioner, 4, monkeypatch)
    assert len({text for row in together for text in row}) > 6, "captions depend on seeds and images"
    pixels, all_seeds = pixels_of(pictures(4), captioner.image), seeds(4, 3)
    names = ("vision_model", "vision_tower", "visual", "image_encoder", "encoder")
    modules = {"visual": captioner._visual} if kind == "coca" else dict(captioner._model.model.named_modules())
    tower = next(module for name, module in modules.items() if name.split(".")[-1] in names)
    passes: list[int] = []
    tower.register_forward_hook(lambda module, inputs, output: passes.append(1))
    order = [2, 0, 3, 1]
    assert captioner.caption(pixels[order], all_seeds[order]) == [together[i] for i in order]
    assert len(passes) == 1, "images are encoded once for all their captions"
    assert captioner.caption(pixels, all_seeds[:, ::-1].copy()) == [row[::-1] for row in together]
    with pytest.raises(ValueError, match=r"seeds of shape \(4, 3\)"):
        captioner.caption(pixels, seeds(4, 4))


TOP_K = {"strategy": "top_k", "top_k": 5}
GREEDY = {"strategy": "greedy", "captions": 1}
BEAMS = {"strategy": "beams", "beams": 4}
DIVERSE = {"strategy": "diverse_beams", "beams": 4, "groups": 2, "length_penalty": 0.5}


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        *((strategy, "coca") for strategy in (TOP_K, GREEDY, BEAMS, DIVERSE)),
        *((BEAMS, kind) for kind in ("blip", "git", "qwen2_vl")),
        (GREEDY, "git"),
        (TOP_K, "qwen2_vl"),
        (DIVERSE, "blip"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["strategy"],
)
def test_captions_do_not_depend_on_the_batch_for_any_strategy(
    build_captioner: Captioners, kind: str, strategy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"captions": 3, "min_length": 1, "max_length": 9, "repetition_penalty": 1.3, **strategy}
    together = check_independent(build_captioner(kind, **options), 3, monkeypatch)
    assert all(len(row) == options["captions"] for row in together)
    if kind == "coca":
        assert all(map(all, together))
    else:
        assert len({tuple(row) for row in together}) == 3, "captions depend on images"


@pytest.mark.parametrize("kind", ["coca", "blip", "qwen2_5_vl"])
def test_bf16_captions_are_repeatable_and_chat_models_hold_bf16_weights(build_captioner: Captioners, kind: str) -> None:
    captioner: Any = build_captioner(kind, captions=2, precision="bf16")
    assert captioned(captioner, 2) == captioned(captioner, 2)
    if kind != "coca":
        dtype = next(captioner._model.model.parameters()).dtype
        assert dtype == (torch.bfloat16 if kind in tiny_captioners.CHAT else torch.float32)


@pytest.mark.parametrize("family", ["open_clip", "transformers"])
def test_bf16_embeddings_are_close_to_fp32_and_of_unit_norm(models: dict[str, str], root: Path, family: str) -> None:
    spec = {"family": family, "model": models["small"] if family == "open_clip" else str(root / "clip")}
    exact, fast = (load_model("t", teacher_spec(**spec, precision=name), "cpu") for name in ("fp32", "bf16"))
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    texts = ["a", "a photo of a dog on the beach", "", "so many words " * 60]
    for one, other in (
        (exact.encode_images(pixels), fast.encode_images(pixels)),
        (exact.encode_texts(texts), fast.encode_texts(texts)),
    ):
        assert other.dtype == torch.float32
        assert not torch.equal(one, other)
        torch.testing.assert_close(other.norm(dim=-1), torch.ones(len(other)))
        assert (one * other).sum(dim=-1).min() > 0.99
