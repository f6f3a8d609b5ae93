"""Exported folders load in open_clip."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch

from teachers.open_clip.export import write_open_clip
from tests.helpers import tiny_models


def test_an_exported_folder_loads_in_open_clip_with_equal_outputs(tmp_path: Path) -> None:
    name = tiny_models.open_clip_model(tmp_path / "a", preprocess={"mean": 0.5, "std": 0.25})
    config = json.loads((tmp_path / "a" / "open_clip_config.json").read_text())["model_cfg"]
    model = open_clip.create_model(name).eval()
    write_open_clip(model, config, open_clip.get_tokenizer(name), str(tmp_path / "b" / "deep"))
    loaded = open_clip.create_model(f"local-dir:{tmp_path / 'b' / 'deep'}").eval()
    pixels, tokens = torch.randn(2, 3, 32, 32), open_clip.get_tokenizer(name)(["a cat", "a dog"])
    with torch.inference_mode():
        assert torch.equal(loaded.encode_image(pixels), model.encode_image(pixels))
        assert torch.equal(loaded.encode_text(tokens), model.encode_text(tokens))
    assert open_clip.get_model_preprocess_cfg(loaded) == open_clip.get_model_preprocess_cfg(model)


def test_the_files_of_a_hugging_face_tokenizer_are_exported(tmp_path: Path) -> None:
    name = tiny_models.open_clip_model(
        tmp_path / "a", custom_text=True, vocab_size=300, context_length=24, hf_tokenizer_name="own"
    )
    tiny_models.tokenizer(tmp_path / "a", start="<s>", end="</s>", pad="<pad>", length=24)
    config = json.loads((tmp_path / "a" / "open_clip_config.json").read_text())["model_cfg"]
    write_open_clip(open_clip.create_model(name), config, open_clip.get_tokenizer(name), str(tmp_path / "b"))
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'b'}")(["a cat"])
    assert torch.equal(tokens, open_clip.get_tokenizer(name)(["a cat"]))
