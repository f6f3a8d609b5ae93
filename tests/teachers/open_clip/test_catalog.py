"""Models of open_clip before they are loaded: names, tags, folders and identities, without network access."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import yaml

from teachers.open_clip import catalog, released
from teachers.registry import describe_teacher, teacher_spec
from teachers.spec import ModelInfo
from tests.helpers import tiny_models


def test_every_tag_is_accepted_or_its_error_names_a_model_that_accepts_it() -> None:
    known = set(catalog.builtin_models())
    for model, tag in open_clip.list_pretrained():
        if model not in known:
            continue
        try:
            catalog.check_model(model, tag)
        except ValueError as error:
            other = str(error).rsplit(" ", 1)[-1]
            catalog.check_model(other, tag)


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-L14", "openai", "model 'ViT-L14' is unknown to open_clip; did you mean ViT-L-14"),
        ("MobileCLIP-S9", None, "'MobileCLIP-S9' is unknown to open_clip; did you mean MobileCLIP-S"),
        ("MobileCLIP-S3", "dfndr2b", "'dfndr2b' is neither a tag of MobileCLIP-S3 nor a checkpoint file"),
        ("ViT-L-14", "dnf2b", "'dnf2b' is neither a tag of ViT-L-14 nor a checkpoint file; did you mean dfn2b"),
        ("ViT-L-14", None, r"no weights without `pretrained`: set a checkpoint file or a tag \(openai"),
        ("ViT-L/14", "./epoch_9.pt", r"checkpoint \./epoch_9\.pt does not exist"),
        ("local-dir:/absent/folder", None, "folder /absent/folder does not exist"),
        ("local-dir:/tmp", "openai", "`pretrained` is not used with local-dir:"),
        ("hf-hub:apple/DFN2B-CLIP-ViT-L-14", "dfn2b", "`pretrained` is not used with hf-hub:"),
    ],
)
def test_wrong_names_are_rejected_with_the_fix(
    models: dict[str, str], model: str, pretrained: str | None, message: str
) -> None:
    model = models["small"] if model == "local-dir:/tmp" else model
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        catalog.check_model(model, pretrained)


def test_incomplete_folders_are_rejected(models: dict[str, str], tmp_path: Path) -> None:
    def check(error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            catalog.check_model(f"local-dir:{tmp_path}", None)

    config = tmp_path / "open_clip_config.json"
    check(FileNotFoundError, r"open_clip_config\.json does not exist")
    shutil.copy(catalog.local_folder(models["small"]) / config.name, config)
    check(FileNotFoundError, r" has no weights: expected open_clip_model\.safetensors")
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).touch()
    check(ValueError, r"several checkpoints \(a\.pt, b\.pt\): rename the one")
    config.write_text("{}")
    check(ValueError, "has no `model_cfg`")
    config.write_text("{")
    check(ValueError, "is not JSON")


def test_the_identity_of_a_folder_is_its_content_not_its_path(tmp_path: Path) -> None:
    model = tiny_models.open_clip_model(tmp_path / "a", embed_dim=24)
    info = describe_teacher("a", teacher_spec(model=model))
    assert (info.dim, info.images, info.texts) == (24, True, True)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert describe_teacher("b", teacher_spec(model=f"local-dir:{tmp_path / 'b'}")) == info
    others = [
        teacher_spec(model=model, precision="bf16"),
        teacher_spec(model=tiny_models.open_clip_model(tmp_path / "b", embed_dim=24, seed=1)),
        teacher_spec(model=tiny_models.open_clip_model(tmp_path / "c", embed_dim=24, preprocess={"std": 0.5})),
    ]
    assert info.identity not in [describe_teacher("a", other).identity for other in others]


def test_the_identity_of_a_checkpoint_is_its_content_and_of_a_tag_its_name(tmp_path: Path) -> None:
    def described(file: str) -> ModelInfo:
        return describe_teacher("a", teacher_spec(model="ViT-B-32", pretrained=str(tmp_path / file)))

    (tmp_path / "a.pt").write_bytes(b"weights")
    first = described("a.pt")
    (tmp_path / "a.pt").rename(tmp_path / "b.pt")
    assert described("b.pt") == first
    (tmp_path / "b.pt").write_bytes(b"others")
    assert described("b.pt") != first
    tagged = describe_teacher("a", teacher_spec(model="ViT-L/14", pretrained="dfn2b-s39b"))
    assert tagged.dim == 768
    assert tagged.identity == {
        "family": "open_clip", "model": "ViT-L-14", "pretrained": "dfn2b_s39b", "precision": "fp32",
    }  # fmt: skip


def preprocess_of(model: str, tag: str) -> dict[str, Any]:
    """The preprocessing of a tag in open_clip's own table, as a config writes it."""
    found = open_clip.get_pretrained_cfg(model, tag)
    channels = {key: [float(value) for value in found[key]] for key in ("mean", "std")}
    return {**channels, "interpolation": found["interpolation"], "resize_mode": found["resize_mode"]}


def test_a_file_of_a_released_model_needs_the_preprocessing_in_which_its_tags_differ_from_open_clip(
    tmp_path: Path,
) -> None:
    file = str(tmp_path / "a.pt")
    Path(file).write_bytes(b"weights")
    weights = describe_teacher("a", teacher_spec(model="ViT-B-32", pretrained=file)).identity["weights"]
    refused = 0
    for model in set(catalog.builtin_models()) - released.WEIGHTS.keys():
        tags = {tag: preprocess_of(model, tag) for tag in open_clip.list_pretrained_tags_by_model(model)}
        # The fingerprint of right preprocessing is that of versions without the key.
        before = {"family": "open_clip", "precision": "fp32", "model": model, "weights": weights}
        if all(values == catalog.DEFAULT_PREPROCESS for values in tags.values()):
            assert describe_teacher("a", teacher_spec(model=model, pretrained=file)).identity == before
            continue
        refused += 1
        with pytest.raises(ValueError, match=r"does not state its preprocessing, .* add `preprocess: ") as caught:
            describe_teacher("a", teacher_spec(model=model, pretrained=file))
        offers = re.findall(r"`(preprocess: {.*?})` as its tag (\w+)", str(caught.value))
        assert offers
        for line, tag in offers:
            spec = teacher_spec(model=model, pretrained=file, **yaml.safe_load(line))
            identity = describe_teacher("a", spec).identity
            changed = identity.pop("preprocess", {})
            assert (identity, {**catalog.DEFAULT_PREPROCESS, **changed}) == (before, tags[tag])
    assert refused == 54


def test_the_folder_of_a_checkpoint_states_its_preprocessing(tmp_path: Path) -> None:
    stated = {"mean": 0.25, "std": [0.5, 0.5, 0.5], "interpolation": "bilinear", "size": 64}
    tiny_models.open_clip_model(tmp_path, preprocess=stated)

    def changed(file: str, **keys: Any) -> Any:
        spec = teacher_spec(model="MobileCLIP2-S0", pretrained=str(tmp_path / file), **keys)
        return describe_teacher("a", spec).identity["preprocess"]

    found = {"mean": [0.25] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}
    assert changed("open_clip_model.safetensors") == found
    mean = [0.1, 0.2, 0.3]
    assert changed("open_clip_model.safetensors", preprocess={"mean": mean}) == {**found, "mean": mean}
    (tmp_path / "other.pt").write_bytes(b"weights")
    with pytest.raises(ValueError, match="does not state its preprocessing"):
        changed("other.pt")  # the folder's config is that of other weights
    with pytest.raises(ValueError, match=r"add `preprocess: \{mean: \[0.0, 0.0, 0.0\], std: \[1.0, 1.0, 1.0\]\}`"):
        changed("other.pt", preprocess={"interpolation": "bilinear"})  # a part is not enough


def test_stated_preprocessing_replaces_that_of_tags_and_folders(tmp_path: Path) -> None:
    def identity(model: str, tag: str | None, **keys: Any) -> dict[str, Any]:
        return describe_teacher("a", teacher_spec(model=model, pretrained=tag, preprocess=keys)).identity

    folder = tiny_models.open_clip_model(tmp_path, preprocess={"mean": [0.5] * 3})
    for model, tag in (("MobileCLIP2-S0", "dfndr2b"), (folder, None)):
        own = json.loads((tmp_path / "open_clip_config.json").read_text())["preprocess_cfg"]
        own = own if tag is None else preprocess_of(model, tag)
        before = identity(model, tag)
        assert identity(model, tag, mean=own["mean"]) == before, "stated as it is"
        assert identity(model, tag, mean=[0.1] * 3) == {**before, "preprocess": {"mean": [0.1] * 3}}
