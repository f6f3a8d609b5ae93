"""The demo's tour and comparison, and the configs that come with the project."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

import schemas
from reinforce.captioning.config import load_captioner_config
from reinforce.config import Augmentations, load_config
from reinforce.dataset.augment import sample_augmentation, to_records
from reinforce.dataset.store import Store
from reinforce.demo.compare import ARMS, MEASURES, compare, student_config
from reinforce.demo.data import (
    write_shards,
)
from reinforce.demo.models import MODELS
from reinforce.demo.show import show_dataset
from reinforce.demo.students import train_side_by_side
from reinforce.demo.styles import PIXELS
from reinforce.errors import UserError
from reinforce.student.config import load_student_config
from reinforce.training.results import Results
from tests.demo.test_demo import read_samples

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "configs/demo-models"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_shards(tmp_path_factory.mktemp("demo") / "shards")


# --- configs


def test_demo_config_is_valid_and_names_the_committed_models() -> None:
    config = load_config(ROOT / "configs/demo.yaml")
    assert (config.source, config.output) == ("demo/shards/*.tar", "demo/dataset")
    named = [spec.model for spec in [*config.teachers.values(), *config.captioners.values()]]
    assert {f"local-dir:configs/demo-models/{name}" for name in MODELS} == set(named)
    assert len(config.teachers) == 2


@pytest.mark.parametrize("name", ["conv-64", "conv-48"])
def test_the_teachers_recipes_are_plain_clip(name: str) -> None:
    config = load_student_config(ROOT / f"configs/demo-teachers/{name}.yaml")
    assert (config.loss.lambda_, config.student.model) == (0, f"local-dir:demo/blanks/{name}")
    assert load_config(ROOT / "configs/demo-teachers/samples.yaml").output == config.data.datasets[0].url


def test_the_captioners_recipe_ends_with_clean_captions() -> None:
    first, second = (
        load_captioner_config(ROOT / f"configs/demo-teachers/coca-{half}.yaml") for half in ("pretrain", "finetune")
    )
    assert second.captioner.model == f"local-dir:{first.output}/captioner"
    assert (first.data.captions, second.data.captions) == (["txt"], ["json:phrase"])
    assert (first.seed, first.held_out) == (second.seed, second.held_out)


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
    samples = dict(list(read_samples(shard).items())[:3])
    policy = Augmentations(count=2, size=48)
    rows = [
        {
            "key": key,
            "caption": members["txt"].decode(),
            "metadata": members["json"].decode(),
            "width": PIXELS,
            "height": PIXELS,
            "image": members["png"],
            "augmentations": to_records([sample_augmentation(policy, 0, key, k, PIXELS, PIXELS) for k in range(2)]),
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
        "embeddings/conv-64/images": pa.table(
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
        "embeddings/conv-64/images/",
        keys[0],
        "'second words'",
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


# --- the comparison


def _train(folder: Path, metric: float, steps: int = 300) -> None:
    """What a training leaves that ended so."""
    metrics = {name: metric for _, name in MEASURES.values()}
    results = Results(str(folder), "student", steps, steps * 192, 60.0, 1_000_000, 1.0, metrics, None, 0)
    results.write(Store(str(folder)))
    rows = [{"step": step, "metrics": dict.fromkeys(metrics, metric * step / steps)} for step in (100, steps)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [{"step": 10, "loss": 5.0}, *rows]))


def test_the_comparison_shows_both_students_and_writes_numbers_and_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arm, metric in (("plain", 0.125), ("distilled", 0.25)):
        _train(tmp_path / "students" / arm, metric)
    compare(tmp_path / "students", tmp_path)
    printed = capsys.readouterr().out
    assert re.search(r"plain.*12\.5%.*\n.*distilled.*25\.0%", printed)
    for text in ("unseen style", "unseen pictures", "What was made", "What to try next"):
        assert text in printed
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["distilled"] == {**dict.fromkeys(MEASURES, 0.25), "seconds_per_step": 0.2}
    assert {"own_style", "unseen_style", "unseen_pictures", "retrieval"} <= found["plain"].keys()
    with Image.open(tmp_path / "curves.png") as curves:
        assert len(curves.convert("RGB").getcolors(maxcolors=2**20) or []) > 20


def test_students_that_cannot_be_compared_are_a_users_error(tmp_path: Path) -> None:
    _train(tmp_path / "plain", 0.1)
    with pytest.raises(UserError, match="distilled has no finished training"):
        compare(tmp_path, tmp_path)
    _train(tmp_path / "distilled", 0.1, steps=200)
    with pytest.raises(UserError, match="200 and 300 steps"):
        compare(tmp_path, tmp_path)


def test_the_two_students_differ_in_what_they_learn_from_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plain, distilled = (student_config(arm, "out", seed=3).model_dump() for arm in ARMS)
    assert (plain["loss"]["lambda_"], plain["data"]["captioners"]) == (0, {})
    for section, key in (("loss", "lambda_"), ("data", "captioners")):
        assert plain[section].pop(key) != distilled[section].pop(key)
    assert plain == distilled
    assert plain["seed"] == 3
    assert {name for _, name in MEASURES.values()} <= set(student_config("plain", "out").evaluate.metrics)


def test_a_training_that_fails_ends_those_beside_it_and_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    trainings = {name: [f"output=out/{name}", f"data.datasets=no-{name}"] for name in ("first", "second", "third")}
    with pytest.raises(UserError, match=r"the training '(first|second)' ended with status 2"):
        train_side_by_side(trainings)
    printed = capfd.readouterr().out
    assert re.search(r"(first |second) \| error: .*no-(first|second)", printed)
    assert "third" not in printed
