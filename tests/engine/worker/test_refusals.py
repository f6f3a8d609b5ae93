"""Refusals of a lease."""

from __future__ import annotations

from pathlib import Path

from reinforce.config import parse_config
from reinforce.dataset.files.store import Store
from reinforce.engine.worker.refusals import Refusals
from reinforce.source.samples import Refusal
from schemas import Reason
from teachers.redact import Redactor


def test_only_a_reason_for_the_whole_shard_refuses_the_shard() -> None:
    refusals = Refusals()
    refusals.add("samples", Refusal("a", Reason.IMAGE_BROKEN, "cut"))
    refusals.add("samples", Refusal(None, Reason.SHARD_DAMAGED, "at byte 9"))
    assert refusals.shard_reason is None, "a damaged shard keeps its readable rows"
    refusals.add("samples", Refusal(None, Reason.SHARD_MISSING, "gone"))
    assert refusals.shard_reason == "shard_missing"


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
