"""Prompts and image sizes of chat models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from teachers.device.accelerator import Accelerator
from teachers.protocols import ImageSpec
from teachers.transformers.captioner import load
from teachers.transformers.chat import chat_image_spec
from tests.helpers import tiny_captioners
from tests.helpers.tiny_captioners import Captioners, captioned, spec_of


def test_a_prompt_is_formatted_by_the_chat_template_unless_it_contains_the_image_token(
    build_captioner: Captioners,
) -> None:
    def asked(**options: Any) -> str:
        captioner: Any = build_captioner("llava", **options)
        text: str = captioner._tokenizer.decode(captioner._model._prompt["input_ids"][0])
        return text.replace("<image>" * 16, "IMAGE").replace("<s>", "")

    assert asked() == "USER: IMAGE\nDescribe it. ASSISTANT:"
    assert asked(prompt="Look: <image> It shows") == "Look: IMAGE It shows"


def test_a_chat_model_without_a_template_needs_the_whole_prompt(tmp_path: Path) -> None:
    name = tiny_captioners.llava(tmp_path / "llava", template=False)
    with pytest.raises(ValueError, match="no chat template: write the whole `prompt`, with <image> in place"):
        load(spec_of(name, "llava"), Accelerator("cpu"))
    load(spec_of(name, "llava", prompt="<image> It shows"), Accelerator("cpu"))


def test_max_length_is_limited_to_the_context_after_the_prompt(build_captioner: Captioners) -> None:
    captioner: Any = build_captioner("llava")
    room = 256 - captioner._model._prompt_length
    build_captioner("llava", max_length=room)
    with pytest.raises(ValueError, match=f"max_length {room + 1} exceeds the {room} tokens that"):
        build_captioner("llava", max_length=room + 1)


def test_a_larger_image_size_gives_more_image_tokens(build_captioner: Captioners) -> None:
    def tokens(kind: str, **options: Any) -> tuple[int, int]:
        captioner: Any = build_captioner(kind, captions=1, max_length=9, **options)
        assert captioned(captioner, 2)[0][0]
        return captioner.image.height, captioner._model._prompt_length

    for kind, side in (("idefics3", 64), ("qwen2_vl", 96), ("llava_next", 64)):
        usual = tokens(kind, **({"image_size": 48} if kind == "qwen2_vl" else {}))
        larger = tokens(kind, image_size=side)
        assert larger[0] == side
        assert larger[1] > usual[1]


@pytest.mark.parametrize(
    ("kind", "side", "message"),
    [
        ("llava", 64, "image_size 64 is not used: the model's images are 32 x 32 pixels; remove it"),
        ("qwen2_vl", 50, "image_size 50 must be a multiple of 16"),
    ],
)
def test_an_unsupported_image_size_is_rejected(build_captioner: Captioners, kind: str, side: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_captioner(kind, image_size=side)


def test_images_are_squares_of_the_processors_size_or_a_default_size() -> None:
    qwen = hf.Qwen2VLImageProcessor().to_dict()
    assert chat_image_spec(qwen, None) == (ImageSpec(448, (0.0,) * 3, (1.0,) * 3, resize="squash"), {})  # type: ignore[arg-type]
    tiles = chat_image_spec(hf.Idefics3ImageProcessor().to_dict(), None)
    assert (tiles[0].size, tiles[1]) == (364, {"size": {"longest_edge": 364}, "do_image_splitting": False})
    llava = chat_image_spec(hf.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336).to_dict(), None)[0]
    assert (llava.size, llava.resize, llava.interpolation) == (336, "crop", "bicubic")
