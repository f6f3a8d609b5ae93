"""The demo's models before training, and those in the repository."""

from __future__ import annotations

import io
import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from reinforce.demo.data import UNSEEN_STYLE
from reinforce.demo.models import MODELS, VOCABULARY, keep_model, read_captions, write_initial_models
from reinforce.errors import UserError
from tests.helpers.demo import COMMITTED, read_shards


@pytest.fixture(scope="module")
def teacher_data(tmp_path_factory: pytest.TempPathFactory, demo_folder: Path) -> Path:
    """Shards with enough words for the vocabulary."""
    folder = tmp_path_factory.mktemp("teacher_data")
    for name, shards in {"twemoji": "shards", "openmoji": f"tests/{UNSEEN_STYLE}"}.items():
        (folder / name).symlink_to(demo_folder / shards)
    return folder


@pytest.fixture(scope="module")
def initial_models(tmp_path_factory: pytest.TempPathFactory, teacher_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("initial_models")
    write_initial_models(folder, teacher_data)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_a_committed_model_is_small_has_its_initial_config_and_recognizes_an_apple(
    name: str, shards: list[Path]
) -> None:
    written = json.loads((COMMITTED / name / "open_clip_config.json").read_text())
    assert written["model_cfg"] == json.loads(json.dumps(MODELS[name]))["model_cfg"]
    weights = load_file(COMMITTED / name / "open_clip_model.safetensors")
    assert all(value.dtype == torch.float16 for value in weights.values() if value.is_floating_point())
    assert sum((COMMITTED / one / "open_clip_model.safetensors").stat().st_size for one in MODELS) < 16e6
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{COMMITTED / name}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{COMMITTED / name}")
    names = ["a red apple", "a bicycle", "a grinning face", "a dog"]
    with Image.open(io.BytesIO(read_shards(shards)["1f34e"]["png"])) as drawn:
        rgba = drawn.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    with torch.no_grad():
        seen = model.eval().encode_image(preprocess(image)[None], normalize=True)
        texts = model.encode_text(tokenizer(names), normalize=True)
    assert seen.shape == (1, MODELS[name]["model_cfg"]["embed_dim"])
    assert names[(seen @ texts.T).argmax()] == "a red apple"


def test_initial_models_are_fully_initialized_and_depend_only_on_the_seed(
    initial_models: Path, teacher_data: Path, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        write_initial_models(tmp_path / "same", teacher_data)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(torch.get_rng_state(), state)
    write_initial_models(tmp_path / "other", teacher_data, seed=1)
    for path in initial_models.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "same" / path.relative_to(initial_models)).read_bytes()
    weights = {
        folder: load_file(folder / "coca-64/open_clip_model.safetensors")
        for folder in (initial_models, tmp_path / "other")
    }
    assert all(torch.isfinite(value).all() for value in weights[initial_models].values())
    assert not torch.equal(*(found["text_decoder.text_projection"] for found in weights.values()))


def test_tokenizer_encodes_every_text_and_its_end_token_is_the_highest(initial_models: Path) -> None:
    tokenizer = open_clip.get_tokenizer(f"local-dir:{initial_models / 'conv-64'}")
    tokens = tokenizer(["A red Apple", "Ünïcode ☃, zzz"])
    assert tokens.shape == (2, 24)
    assert (tokens.max(dim=1).values == VOCABULARY - 1).all()
    assert [tokenizer.tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens] == [
        "a red apple",
        "ünïcode ☃, zzz",
    ]


def test_keep_model_writes_float16_weights_and_copies_the_other_files(initial_models: Path, tmp_path: Path) -> None:
    size = keep_model(initial_models / "coca-64", tmp_path / "kept")
    assert size == (tmp_path / "kept/open_clip_model.safetensors").stat().st_size
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {
        path.name for path in (initial_models / "coca-64").iterdir()
    }
    half, whole = (
        load_file(f / "open_clip_model.safetensors") for f in (tmp_path / "kept", initial_models / "coca-64")
    )
    assert all(torch.equal(half[name], value.half()) for name, value in whole.items())
    with pytest.raises(UserError, match="finish its training first"):
        keep_model(tmp_path, tmp_path / "kept")
    with pytest.raises(UserError, match=r"python -m reinforce\.demo teacher-data"):
        next(read_captions(tmp_path))
