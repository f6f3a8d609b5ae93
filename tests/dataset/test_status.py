"""The status of a dataset: layers, quarantine, the last run."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from reinforce.dataset.drop import drop, plan_drop
from reinforce.dataset.status import read_status, status_table
from reinforce.dataset.store import Store
from schemas import Reason
from tests.helpers.views import make_view


@pytest.fixture
def store(dataset: Path) -> Store:
    return Store(str(dataset))


def test_layers_have_their_shards_and_bytes_and_quarantined_rows_are_counted_by_reason(store: Store) -> None:
    for run in ("2026-01-01", "2026-01-02"):
        store.write_json({"run": run}, "runs", run, "summary.json")
    store.write_json({}, "runs", "2026-01-03", "config.json")
    status = read_status(store.url)
    last = {"run": "2026-01-02"}  # the latest with a summary
    assert (status["url"], status["samples"], status["quarantine"], status["last_run"]) == (store.url, 2, {}, last)
    layer = status["layers"]["embeddings/red/images"]
    assert (layer["shards"], layer["count"], layer["dim"], layer["dtype"]) == (2, 2, 8, "float16")
    assert layer["bytes"] == sum(store.shards("embeddings/red/images").values())
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(status_table(status))
    lines = {line.split()[0]: line.split()[1:] for line in console.export_text().splitlines()}
    assert lines["layer"] == ["shards", "bytes", "content"]
    assert lines["samples"][0] == "2/2"
    assert lines["samples"][-3:] == ["rows", "and", "images"]
    assert lines["captions/namer"][-2:] == ["2", "captions"]
    assert lines["embeddings/blue/caption"][-3:] == ["[1,", "12]", "float16"]
    broken, damaged = Reason.IMAGE_BROKEN, Reason.SHARD_DAMAGED
    store.quarantine("samples", "one", [("a", broken, "cut\noff"), ("b", broken, ""), (None, damaged, "at byte 9")])
    store.quarantine("samples", "two", [("c", broken, "")])
    assert read_status(store.url)["quarantine"] == {
        "samples": {
            "files": 2,
            "reasons": {"image_broken": 3, "shard_damaged (shard)": 1},
            "examples": {"image_broken": "one: a: cut off", "shard_damaged (shard)": "one: at byte 9"},
        }
    }


def test_views_are_listed_with_what_they_keep_and_whether_they_are_current(store: Store) -> None:
    for name, where in (("all", "width > 0"), ("some", "captions.namer[1] IS NOT NULL AND key LIKE '%0'")):
        make_view(store.url, where, name=name)
    drop(store, plan_drop(store, ["captions/*", "embeddings/*"]))
    (Path(store.url) / "views" / "stopped" / "parts-0").mkdir(parents=True)
    views = read_status(store.url)["views"]
    assert [view.line() for view in views] == [
        "views/all: 12 of 12 samples, current",
        "views/some: 2 of 12 samples, not current: captions/namer was dropped since view some was made",
    ]
    Path(store.url, "views/all/view.json").write_text("{}")
    [damaged, _] = read_status(store.url)["views"]
    assert "does not describe a view. Make it again with reinforce select" in damaged.line()
