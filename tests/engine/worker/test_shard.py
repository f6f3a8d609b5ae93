"""One shard through its layers, in this process: its result, and what its files contain."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import reinforce
from reinforce.config import parse_config
from reinforce.dataset.augment.records import replay
from reinforce.dataset.files.store import Store
from reinforce.engine.inference.models import load_models
from reinforce.engine.messages.results import ShardResult
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.worker.shard import ShardProcess
from reinforce.images.policy import decode
from reinforce.seeds import seed_for
from teachers.preprocessing.pixels import to_pixels
from tests.helpers.data import config_of, members_of, tree, write_tar
from tests.helpers.decoding import decode_pool
from tests.helpers.models import ColorTeacher, GroupCaptioner
from tests.helpers.reinforced import reinforce_here


def process(config: dict[str, Any], group_rows: int = 4) -> ShardResult:
    parsed = parse_config(config)
    plan = make_plan(parsed)
    [shard] = plan.pending
    models = load_models(parsed, [plan.layers[name] for name in shard.layers])
    return ShardProcess(shard, parsed, plan.layers, Store(parsed.output), models, decode_pool(), group_rows).run()


def shard_config(folder: Path, members: list[tuple[str, bytes]], **changes: Any) -> dict[str, Any]:
    write_tar(folder / "source" / "0.tar", members)
    return config_of(f"{folder}/source/0.tar", folder / "out", **changes)


def test_a_result_lists_the_committed_layers_their_bytes_and_what_was_refused(tmp_path: Path) -> None:
    members = [member for member in members_of(0, 9) if member[0] != "00000002.txt"]
    members[3] = (members[3][0], members[3][1][:200])
    result = process(shard_config(tmp_path, members))
    files = {name: data for name, data in tree(tmp_path / "out").items() if not name.startswith("quarantine")}
    assert {name.rpartition("/")[0] for name in files} == set(result.layers)
    assert (result.samples, result.bytes, result.quarantine_reason) == (8, sum(map(len, files.values())), None)
    assert result.refused == {"image_broken": 1, "no_text": 3}, "one caption is missing, for both teachers"
    assert result.refused_samples == 2
    [path] = (tmp_path / "out/quarantine/embeddings/red/caption").iterdir()
    [row] = pq.read_table(path).to_pylist()
    assert row["detail"] == "no caption to encode: none at input.captions (txt, json:caption)"
    assert 0 < result.busy < result.seconds
    assert result.read_bytes == sum(len(data) for _, data in members), "also of what is refused"
    assert sum(result.times.values()) == pytest.approx(result.seconds, abs=0.5)
    assert result.event()["times"].keys() == result.times.keys() >= {"reading", "decoding", "writing"}
    inputs = {name: stage["inputs"] for name, stage in result.stages.items()}
    images = {"embeddings/red/images": 16, "embeddings/blue/images": 16, "captions/namer": 16}
    assert {name: inputs[name] for name in images} == images, "8 rows with 2 augmentations and 2 captions"
    assert all(stage["seconds"] > 0 for stage in result.stages.values())
    stage = result.event()["stages"]["embeddings/red/images"]
    assert (stage["inputs"], len(str(stage["seconds"])) < 12) == (16, True), "rounded, as there may be many events"
    for name in files:
        metadata = pq.read_metadata(tmp_path / "out" / name)
        assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [4, 4]


def test_a_shard_that_is_refused_as_a_whole_commits_nothing_but_its_quarantine(tmp_path: Path) -> None:
    config = shard_config(tmp_path, members_of(0, 3))
    (tmp_path / "source" / "0.tar").write_text("not a tar\n" * 100)
    result = process(config)
    assert (result.layers, result.samples, result.quarantine_reason) == ((), 0, "shard_unreadable")
    [file] = tree(tmp_path / "out")
    assert file.startswith("quarantine/samples/")


def test_the_effects_of_clean_are_counted(tmp_path: Path) -> None:
    captioner = {"class": "tests.helpers.models:RepetitiveCaptioner", "captions": 3, "clean": {"first_sentence": True}}
    result = process(shard_config(tmp_path, members_of(0, 4), captioners={"c": captioner}, teachers={}))
    assert result.cleaned["c"]["captions"] == 12
    assert all(result.cleaned["c"].values()), "counts of zero are left out"


@pytest.mark.parametrize("limit", [1000, 2])
def test_a_captioner_may_decode_the_images_of_a_row_group_together_whatever_the_batch(
    limit: int, tmp_path: Path
) -> None:
    def captions(kind: str, batch: int, **options: Any) -> tuple[ShardResult, dict[str, list[str]]]:
        captioner = {"class": f"tests.helpers.models:{kind}", "captions": 2, "options": options}
        folder, changes = tmp_path / f"{kind}{batch}", {"teachers": {}, "workers": {"batch": batch}}
        result = process(shard_config(folder, members_of(0, 9), captioners={"c": captioner}, **changes))
        [path] = (folder / "out" / "captions" / "c").iterdir()
        return result, dict(zip(*pq.read_table(path).to_pydict().values(), strict=True))

    GroupCaptioner.decoded.clear()
    _, alone = captions("SeedCaptioner", 16)
    for batch in (2, 16):
        result, found = captions("GroupCaptioner", batch, limit=limit)
        assert found == alone
        assert result.stages["captions/c"]["inputs"] == 18
        assert [note.split(": ")[1].split(";")[0] for note in result.notes] == [
            "4 images at once do not fit in the memory of the device"
        ] * (limit == 2)
    assert GroupCaptioner.decoded == [4, 4, 1] * 2


def test_captions_that_could_not_be_decoded_are_counted(tmp_path: Path) -> None:
    members = [(name, b"caf\xe9" if name == "00000001.txt" else data) for name, data in members_of(0, 3)]
    result = process(shard_config(tmp_path, members, teachers={}, captioners={}))
    assert result.source_counts == result.event()["source_counts"] == {"captions_replaced": 1}


@pytest.mark.parametrize(
    ("dtype", "stored", "tolerance"),
    [("float16", "halffloat", 1e-3), ("float32", "float", 1e-7), ("int8", "int8", 8e-3)],
)
def test_embeddings_equal_the_teachers_for_replayed_augmentations_in_the_configured_dtype(
    shards: Callable[..., str], tmp_path: Path, dtype: str, stored: str, tolerance: float
) -> None:
    config = config_of(shards(20), tmp_path / "out")
    config["teachers"]["red"]["dtype"] = dtype
    reinforce_here(config)
    for file in (tmp_path / "out" / "embeddings" / "red").rglob("*.parquet"):
        assert str(pq.read_schema(file).field("embeddings").type.value_type) == stored
    teacher = ColorTeacher(torch.device("cpu"), size=16, dim=8)
    limits = parse_config(config_of("x", "y")).input.limits
    seen = 0
    for sample in reinforce.open(str(tmp_path / "out"), teachers=["red"]):
        image = decode(sample.image, limits)
        crops = np.stack([np.asarray(replay(image, record)) for record in sample.augmentations])
        expected = teacher.encode_images(to_pixels(torch.from_numpy(crops), teacher.image)).numpy()
        np.testing.assert_allclose(sample.images["red"], expected, atol=tolerance)
        captions = {"caption": [str(sample.caption)], "namer": sample.captions["namer"] or []}
        assert len(captions["namer"]) == 2
        for name, texts in captions.items():
            expected = teacher.encode_texts(texts).numpy()
            np.testing.assert_allclose(sample.texts["red"][name], expected, atol=tolerance)
        assert sample.metadata is not None
        assert sample.metadata["uid"] == sample.key
        seen += 1
    assert seen == 20


def test_layers_that_are_added_to_images_by_reference_equal_those_of_a_fresh_dataset(
    shards: Callable[..., str], tmp_path: Path
) -> None:
    config = config_of(shards(20, 9), tmp_path / "fresh", images="reference")
    reinforce_here(config)
    grown = {**config, "output": str(tmp_path / "grown")}
    reinforce_here({**grown, "captioners": {}, "teachers": {"red": config["teachers"]["red"]}})
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "grown").rglob("*.parquet")}
    reinforce_here(grown)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    files, fresh = tree(tmp_path / "grown"), tree(tmp_path / "fresh")
    assert json.loads(files.pop("dataset.json")) == json.loads(fresh.pop("dataset.json"))
    assert files == fresh


def test_teachers_with_one_side_have_that_sides_layers_only(shards: Callable[..., str], tmp_path: Path) -> None:
    config = config_of(shards(5), tmp_path / "out")
    config["teachers"] = {
        "eye": {"class": "tests.helpers.models:ImageOnly"},
        "ear": {"class": "tests.helpers.models:TextOnly"},
    }
    reinforce_here(config)
    folders = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out" / "embeddings").glob("*/*")}
    assert folders == {"embeddings/eye/images", "embeddings/ear/caption", "embeddings/ear/namer"}


def test_a_row_that_a_model_cannot_serve_is_null_and_quarantined(shards: Callable[..., str], tmp_path: Path) -> None:
    captioners = {"ill": {"class": "tests.helpers.models:NanCaptioner", "captions": 2}}
    config = config_of(shards(12), tmp_path / "out", captioners=captioners)
    config["teachers"] = {
        "ill": {"class": "tests.helpers.models:FailingTeacher", "options": {"trigger": "thing 7 ", "failure": "nan"}},
        "red": config["teachers"]["red"],
    }
    reinforce_here(config)
    rows = {sample.key: sample for sample in reinforce.open(str(tmp_path / "out"))}
    without = {key for key in rows if seed_for(0, key, "captions/ill") % 4 == 1}
    assert 0 < len(without) < 12
    assert {key for key, row in rows.items() if row.captions["ill"] is None} == without
    assert all(len(texts) == 2 for row in rows.values() if (texts := row.captions["ill"]))
    assert [key for key, row in rows.items() if np.isnan(row.texts["ill"]["caption"]).all()] == ["00000007"]
    assert all(np.isfinite(row.texts["red"]["caption"]).all() for row in rows.values())
    for layer, keys in (("captions/ill", without), ("embeddings/ill/caption", {"00000007"})):
        [path] = (tmp_path / "out" / "quarantine" / layer).glob("*.parquet")
        table = pq.read_table(path)
        assert {*zip(table["key"].to_pylist(), table["reason"].to_pylist(), strict=True)} == {
            (key, "not_finite") for key in keys
        }
