"""One shard through its layers, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from reinforce.config import parse_config
from reinforce.dataset.files.store import Store
from reinforce.engine.inference.models import load_models
from reinforce.engine.messages.results import LayerFailure, ShardResult
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.worker.shard import process_shard
from tests.helpers.data import config_of, members_of, tree, write_tar
from tests.helpers.decoding import decode_pool


def process(config: dict[str, Any], group_rows: int = 4) -> ShardResult:
    parsed = parse_config(config)
    plan = make_plan(parsed)
    [shard] = plan.pending
    models = load_models(parsed, [plan.layers[name] for name in shard.layers])
    return process_shard(shard, parsed, plan.layers, Store(parsed.output), models, decode_pool(), group_rows)


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


def test_a_model_that_raises_commits_nothing(tmp_path: Path) -> None:
    config = shard_config(tmp_path, members_of(0, 3))
    options = {"trigger": "thing 1 ", "failure": "raise"}
    config["teachers"]["ill"] = {"class": "tests.helpers.models:FailingTeacher", "options": options}
    with pytest.raises(LayerFailure, match=r"embeddings/ill/caption: RuntimeError: cannot encode thing 1"):
        process(config)
    assert tree(tmp_path / "out") == {}


def test_captions_of_another_order_are_not_encoded_but_set_aside(tmp_path: Path) -> None:
    config = shard_config(tmp_path, members_of(0, 3))
    first = {**config, "teachers": {"red": config["teachers"]["red"]}}
    process(first)
    [path] = (tmp_path / "out" / "captions" / "namer").glob("*.parquet")
    table = pq.read_table(path)
    pq.write_table(table.take([2, 0, 1]).replace_schema_metadata(pq.read_metadata(path).metadata), path)
    assert process(config).set_aside == {"captions/namer": "its rows are not those of the samples"}
    assert not path.exists()


def test_the_effects_of_clean_are_counted(tmp_path: Path) -> None:
    captioner = {"class": "tests.helpers.models:RepetitiveCaptioner", "captions": 3, "clean": {"first_sentence": True}}
    result = process(shard_config(tmp_path, members_of(0, 4), captioners={"c": captioner}, teachers={}))
    assert result.cleaned["c"]["captions"] == 12
    assert all(result.cleaned["c"].values()), "counts of zero are left out"
