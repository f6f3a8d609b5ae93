"""Whole runs on a local Ray: the files they write, and that nothing is computed twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import reinforce
from reinforce.cli import main
from reinforce.dataset.files.index import read_index
from reinforce.dataset.files.store import Store
from reinforce.dataset.manifest.manifest import read_manifest
from reinforce.dataset.validate.validate import validate
from reinforce.source.urls import shard_name
from tests.helpers.data import config_of, members_of, picture, tree, write_tar
from tests.helpers.reinforced import fresh_dataset

pytestmark = pytest.mark.usefixtures("ray_session")


def events_of(output: Path) -> list[dict[str, Any]]:
    parts = sorted(output.glob("runs/*/events-*.jsonl"))
    return [json.loads(line) for part in parts for line in part.read_text().splitlines()]


def test_a_second_run_does_nothing(shards: Callable[..., str], tmp_path: Path) -> None:
    config = config_of(shards(10, 3), tmp_path / "out")
    summary = reinforce.run(config)
    assert (summary.status, summary.samples, summary.shards) == (0, 13, 2)
    before = tree(tmp_path / "out", layers_only=False)
    summary = reinforce.run(config)
    assert summary.run is None
    assert "nothing to do" in summary.message
    assert tree(tmp_path / "out", layers_only=False) == before


@pytest.mark.slow
def test_two_runs_into_two_folders_give_equal_files(
    shards: Callable[..., str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = shards(30, 30, 5)
    for folder, workers in (("a", {"max": 1}), ("b", {})):
        reinforce.run(config_of(source, tmp_path / folder, workers={"batch": 16, **workers}))
    printed = capfd.readouterr().out
    for workers_used in ("1 worker", "2 workers"):  # the second run has one for each of Ray's cores
        assert f"{workers_used} x 1 CPU, batches of 16 images, device cpu" in printed
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_an_added_teacher_and_captioner_compute_only_their_layers_and_end_as_a_fresh_run(
    shards: Callable[..., str], tmp_path: Path
) -> None:
    source = shards(40, 9)
    whole = config_of(source, tmp_path / "fresh")
    whole["captioners"] = {
        **whole["captioners"],
        "other": {"class": "tests.helpers.models:SeedCaptioner", "captions": 2},
    }
    fresh_dataset(whole)

    first = {**whole, "output": str(tmp_path / "grown"), "teachers": {"red": whole["teachers"]["red"]}}
    first["captioners"] = {"namer": whole["captioners"]["namer"]}
    fresh_dataset(first)
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "grown").rglob("*.parquet") if p.parent.name != "index"}
    reinforce.run({**first, "teachers": whole["teachers"]})
    added = {layer for event in events_of(tmp_path / "grown") if event["event"] == "shard" for layer in event["layers"]}
    assert {"embeddings/blue/images", "embeddings/blue/caption", "embeddings/blue/namer"} <= added
    reinforce.run({**whole, "output": str(tmp_path / "grown")})
    last_run = sorted((tmp_path / "grown" / "runs").iterdir())[-1]
    computed = {
        layer
        for part in last_run.glob("events-*.jsonl")
        for event in map(json.loads, part.read_text().splitlines())
        if event["event"] == "shard"
        for layer in event["layers"]
    }
    assert computed == {"captions/other", "embeddings/red/other", "embeddings/blue/other"}
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    grown, fresh = tree(tmp_path / "grown"), tree(tmp_path / "fresh")
    manifests = [json.loads(files.pop("dataset.json")) for files in (grown, fresh)]
    assert grown == fresh
    assert manifests[0] == manifests[1]


def test_odd_shards_give_the_right_rows_and_the_right_quarantine(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_tar(source / "0-many.tar", members_of(0, 50))  # more than a batch of 8 rows
    write_tar(source / "1-one.tar", members_of(1, 1))
    write_tar(source / "2-empty.tar", [])
    broken = members_of(3, 4)
    broken[3] = (broken[3][0], broken[3][1][:300])
    write_tar(source / "3-broken.tar", broken)
    (source / "4-text.tar").write_text("this is no tar\n" * 100)
    write_tar(source / "5-no-caption.tar", [("a.png", picture(1)), ("b.png", picture(2)), ("b.txt", b"a thing")])
    cut = write_tar(source / "7-cut.tar", members_of(7, 5))
    cut.write_bytes(cut.read_bytes()[:-20_000])
    names = ["0-many", "1-one", "2-empty", "3-broken", "4-text", "5-no-caption", "6-missing", "7-cut"]
    urls = [f"{source}/{name}.tar" for name in names]
    summary = reinforce.run(config_of(urls, tmp_path / "out"))  # type: ignore[arg-type]
    assert summary.status == 0

    def rows(layer: str, name: str) -> int | None:
        path = tmp_path / "out" / layer / f"{shard_name(f'{source}/{name}.tar')}.parquet"
        return pq.read_metadata(path).num_rows if path.exists() else None

    def quarantine(layer: str, name: str) -> list[tuple[Any, Any]]:
        path = tmp_path / "out" / "quarantine" / layer / f"{shard_name(f'{source}/{name}.tar')}.parquet"
        return [(r["key"], r["reason"]) for r in pq.read_table(path).to_pylist()] if path.exists() else []

    found = {name: rows("samples", name) for name in names}
    kept = found.pop("7-cut")
    assert kept is not None
    assert 1 <= kept < 5
    assert found == {
        "0-many": 50, "1-one": 1, "2-empty": 0, "3-broken": 3, "4-text": None, "5-no-caption": 2, "6-missing": None,
    }  # fmt: skip
    for layer in ("captions/namer", "embeddings/red/images", "embeddings/blue/namer"):
        assert {name: rows(layer, name) for name in found} == found
    assert quarantine("samples", "3-broken") == [("00300001", "image_broken")]
    assert quarantine("samples", "4-text") == [(None, "shard_unreadable")]
    assert quarantine("samples", "6-missing") == [(None, "shard_missing")]
    assert (None, "shard_damaged") in quarantine("samples", "7-cut")
    assert quarantine("embeddings/red/caption", "5-no-caption") == [("a", "no_text")]
    assert all(quarantine("samples", name) == [] for name in ("0-many", "1-one", "2-empty", "5-no-caption"))
    again = reinforce.run(config_of(urls, tmp_path / "out"))  # type: ignore[arg-type]
    assert again.run is None, "quarantined shards are not retried by default"


def test_quarantined_shards_are_tried_again_when_asked(tmp_path: Path) -> None:
    urls = [f"{tmp_path}/source/{name}.tar" for name in ("a", "b")]
    write_tar(tmp_path / "source" / "a.tar", members_of(0, 3))
    config = config_of(urls, tmp_path / "out")  # type: ignore[arg-type]
    assert reinforce.run(config).quarantined_shards == 1
    write_tar(tmp_path / "source" / "b.tar", members_of(1, 3))
    assert reinforce.run(config, retry_quarantined=True).quarantined_shards == 0
    write_tar(tmp_path / "source" / "a.tar", members_of(0, 3))
    assert tree(tmp_path / "out") == tree(fresh_dataset({**config, "output": str(tmp_path / "fresh")}))


def test_a_source_without_a_sample_fails_the_run(tmp_path: Path) -> None:
    write_tar(tmp_path / "source" / "0.tar", [("a.png", picture(1)[:200]), ("a.txt", b"an image without its end")])
    summary = reinforce.run(config_of(f"{tmp_path}/source/*.tar", tmp_path / "out"))
    assert summary.status == 1
    assert "no samples" in summary.message


def test_keys_that_repeat_across_runs_are_counted_by_the_run_and_by_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = {"a": members_of(0, 6), "b": members_of(0, 4), "c": members_of(1, 2)}
    for name, of_shard in members.items():
        write_tar(tmp_path / "source" / f"{name}.tar", of_shard)
    config = config_of(f"{tmp_path}/source/a.tar", tmp_path / "out")
    assert reinforce.run(config).repeated_keys == 0
    summary = reinforce.run({**config, "source": f"{tmp_path}/source/*.tar"})
    line = "repeated keys: 4 keys, 50.00% of all, occur in more than one shard, for example in "
    assert summary.repeated_keys == 4
    assert line in summary.text(str(tmp_path / "out"))
    assert not any("record" in event for event in events_of(tmp_path / "out"))
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        main(["status", str(tmp_path / "out")])
    assert line in capsys.readouterr().out


def test_a_run_warns_of_sources_that_were_replaced_since_their_samples_were_written(
    shards: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(shards(2, 2), tmp_path / "out")
    red = {"red": config["teachers"]["red"]}
    reinforce.run({**config, "teachers": red})
    write_tar(tmp_path / "source" / "00001.tar", members_of(5, 3))
    summary = reinforce.run(config)
    assert "1 of 2 shards that get new layers have changed since their samples were written (00001-" in caplog.text
    assert summary.notes == []
    assert len(list(reinforce.open(str(tmp_path / "out")))) == 4, "the stored samples"


def test_damaged_files_are_set_aside_computed_again_and_named(shards: Callable[..., str], tmp_path: Path) -> None:
    """One is found by its size before the run, one when another layer is computed from it."""
    whole = config_of(shards(5), tmp_path / "out")
    first = {**whole, "teachers": {"red": whole["teachers"]["red"]}}
    assert reinforce.run(first).status == 0
    store = Store(whole["output"])
    for name, entry in read_manifest(store)["layers"].items():
        assert dict(read_index(store, name, entry["fingerprint"]).listing().items()) == store.shards(name), name
    before = tree(tmp_path / "out")
    [cut] = (tmp_path / "out" / "embeddings/red/images").iterdir()
    cut.write_bytes(cut.read_bytes()[:-9])
    [flipped] = (tmp_path / "out" / "captions/namer").iterdir()
    data = bytearray(flipped.read_bytes())
    data[pq.read_metadata(flipped).row_group(0).column(1).data_page_offset + 40] ^= 1
    flipped.write_bytes(data)

    summary = reinforce.run(whole)
    assert summary.status == 0
    text = summary.text(whole["output"])
    assert f"embeddings/red/images/{cut.name}: it is not a Parquet file, or it is cut off" in text
    assert f"captions/namer/{flipped.name}: a page " in text
    assert "moved to set-aside/ to be computed again" in text
    assert {path.parent.name for path in (tmp_path / "out" / "set-aside").rglob("*.parquet")} == {"images", "namer"}
    after = tree(tmp_path / "out")
    assert {name: after[name] for name in before if name != "dataset.json"} == {
        name: content for name, content in before.items() if name != "dataset.json"
    }
    assert reinforce.run(whole).run is None
    assert validate(whole["output"]).valid
