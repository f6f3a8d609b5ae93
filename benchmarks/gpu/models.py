"""Models with random weights, as a config names them and as the benchmark builds them."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import open_clip
import torch

from benchmarks.step import TINY
from teachers.coca.captioner import CocaCaptioner
from teachers.device.accelerator import Accelerator, Precision
from teachers.open_clip.teacher import OpenClipTeacher, random_model
from teachers.spec import CaptionerSpec, ModelSpec, TeacherSpec

_get_tokenizer = open_clip.get_tokenizer
_SMALL = {"context_length": 76, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
_VISION: Any = TINY["vision_cfg"]
_TINY: dict[str, dict[str, Any]] = {
    "tiny": TINY,
    "tiny-coca": {
        "embed_dim": 64,
        "vision_cfg": {
            **_VISION,
            "attentional_pool": True,
            "attn_pooler_heads": 2,
            "output_tokens": True,
        },
        "text_cfg": {**_SMALL, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**_SMALL, "attn_pooler_heads": 2},
        "custom_text": True,
    },
}


@functools.cache
def _configs() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="reinforce-bench-gpu-")


@functools.cache
def model_name(name: str) -> str:
    """The name in open_clip's spelling; the config of a tiny model is written to a folder until the process ends."""
    if name not in _TINY:
        return name
    folder = Path(_configs().name, name)
    folder.mkdir()
    config = {"model_cfg": _TINY[name], "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    return f"local-dir:{folder}"


def build(name: str) -> Any:
    """An open_clip model with the same random weights in each run, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _initialized(random_model(model_name(name)))


class RandomTeacher(OpenClipTeacher):
    """A teacher of open_clip, without its weights."""

    def __init__(self, device: torch.device, name: str, precision: Precision = "bf16") -> None:
        tokenizer = patch("open_clip.get_tokenizer", lambda _: load_tokenizer(name))
        with patch("teachers.open_clip.teacher.load_model", _load(name)), tokenizer:
            super().__init__(
                TeacherSpec(model=model_name(name), precision=precision), Accelerator(str(device), precision)
            )


class HashedTokenizer:
    """Stands in for a tokenizer that open_clip would download: its own one, folded into the model's vocabulary."""

    def __init__(self, context_length: int, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = open_clip.SimpleTokenizer(context_length=context_length), vocabulary

    def __call__(self, texts: str | list[str]) -> torch.Tensor:
        tokens: torch.Tensor = self._tokenizer(texts)
        return tokens % self._vocabulary


def vocabulary_size(name: str) -> int:
    """Number of tokens of a model."""
    return int(open_clip.get_model_config(model_name(name))["text_cfg"].get("vocab_size", 49408))


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer, without a download."""
    text = open_clip.get_model_config(model_name(name))["text_cfg"]
    if "hf_tokenizer_name" in text:
        return HashedTokenizer(text.get("context_length", 77), vocabulary_size(name))
    return _get_tokenizer(model_name(name))


class RandomCaptioner(CocaCaptioner):
    """A captioner of open_clip, without its weights. Its captions have all ``words``, since no word is likely."""

    def __init__(
        self, device: torch.device, name: str, captions: int, words: int, precision: Precision = "bf16"
    ) -> None:
        spec = CaptionerSpec(
            model=model_name(name), precision=precision, captions=captions, min_length=words, max_length=words + 2
        )
        with patch("teachers.coca.captioner.load_model", _load(name)):
            super().__init__(spec, Accelerator(str(device), precision))


def _load(name: str) -> Any:
    def load(_: ModelSpec) -> Any:
        return build(name)

    return load


def _initialized(model: Any) -> Any:
    """Initialize CoCa's last projection, which open_clip does not: words are as likely as a trained model's."""
    decoder = getattr(model, "text_decoder", None)
    if decoder is not None:
        torch.nn.init.normal_(decoder.text_projection, std=5 * decoder.text_projection.shape[0] ** -0.5)
    return model
