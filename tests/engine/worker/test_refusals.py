"""Refusals of a lease."""

from __future__ import annotations

from pathlib import Path

from reinforce.config import parse_config
from reinforce.dataset.files.store import Store
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.worker.refusals import Refusals
from reinforce.source.samples import Refusal
from reinforce.source.urls import shard_name
from schemas import Reason
from teachers.redact import Redactor
from tests.helpers.data import config_of, members_of, tree, write_tar
from tests.helpers.reinforced import fresh_dataset


def test_refusals_are_counted_shown_by_example_and_written_to_the_quarantine_without_secrets(tmp_path: Path) -> None:
    teacher = {"class": "tests.helpers.models:TextOnly", "options": {"hf_token": "hf_t0ken-of-eve"}}
    config = parse_config({"source": "x.tar", "output": str(tmp_path), "teachers": {"t": teacher}})
    store, refusals, redact = Store(config.output), Refusals(), Redactor(config.model_dump())
    refusals.write(store, "nothing", redact)
    refusals.add("samples", Refusal("a", Reason.IMAGE_BROKEN, "cut\nby hf_t0ken-of-eve"))
    refusals.add("samples", Refusal("b", Reason.IMAGE_BROKEN, "cut"))
    refusals.add("samples", Refusal(None, Reason.SHARD_DAMAGED, "at byte 9" + "0" * 1000))
    refusals.add("embeddings/t/caption", Refusal("b", Reason.NOT_FINITE, "hf_t0ken-of-eve is invalid"))
    assert refusals.counts() == {"image_broken": 2, "shard_damaged": 1, "not_finite": 1}
    examples = refusals.examples(redact)
    assert examples.keys() == {"image_broken", "shard_damaged", "not_finite"}
    assert examples["image_broken"].startswith("a: cut by ")
    assert examples["shard_damaged"].startswith("at byte 9")
    assert len(examples["shard_damaged"]) <= 300
    refusals.write(store, "shard", redact)
    assert store.shards("quarantine/samples").keys() == {"shard"}
    assert [row["key"] for row in store.quarantined("samples", "shard")] == ["a", "b", None]
    [row] = store.quarantined("embeddings/t/caption", "shard")
    assert (row["key"], row["reason"]) == ("b", "not_finite")
    assert "eve" not in f"{examples} {row['detail']} {store.quarantined('samples', 'shard')}"


def test_what_passes_later_leaves_the_quarantine_and_what_is_refused_again_stays(tmp_path: Path) -> None:
    write_tar(tmp_path / "source" / "0.tar", [*members_of(0, 3), ("bad.png", b"not an image"), ("bad.txt", b"a")])
    config = config_of(f"{tmp_path}/source/0.tar", tmp_path / "out", captioners={})
    store, name = Store(config["output"]), shard_name(config["source"])
    whole = fresh_dataset({**config, "output": str(tmp_path / "whole")})
    for layer in ("samples", "embeddings/red/images"):  # by a run that was killed before it wrote the layers
        store.quarantine(layer, name, [("00000001", Reason.IMAGE_CRASHED, "its decode process died")])
    fresh_dataset(config)
    assert tree(tmp_path / "out") == tree(whole)
    assert [row["key"] for row in store.quarantined("samples", name)] == ["bad"]


def test_a_shard_whose_quarantine_file_is_damaged_is_computed_and_the_file_set_aside(tmp_path: Path) -> None:
    write_tar(tmp_path / "source" / "0.tar", members_of(0, 3))
    config = config_of(f"{tmp_path}/source/0.tar", tmp_path / "out", captioners={})
    store, name = Store(config["output"]), shard_name(config["source"])
    store.quarantine("samples", name, [(None, Reason.SHARD_MISSING, "no such file")])
    path = Path(store.quarantine_path("samples", name))
    path.write_bytes(damaged := path.read_bytes()[:-50])
    [file] = make_plan(parse_config(config)).recomputed
    assert file.line().startswith(f"quarantine/samples/{name}.parquet: ")
    fresh_dataset(config)
    assert tree(tmp_path / "out") == tree(fresh_dataset({**config, "output": str(tmp_path / "whole")}))
    [copy] = (tmp_path / "out" / "set-aside").rglob("*.parquet")
    assert copy.read_bytes() == damaged
