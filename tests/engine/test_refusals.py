"""Refusals of a lease."""

from __future__ import annotations

from pathlib import Path

from reinforce.config import parse_config
from reinforce.dataset.files.store import Store
from reinforce.engine.worker.refusals import Refusals
from reinforce.source.samples import Refusal
from schemas import Reason
from teachers.redact import Redactor


def test_refusals_are_counted_by_reason_over_all_layers() -> None:
    refusals = Refusals()
    refusals.add("samples", Refusal("a", Reason.IMAGE_BROKEN, "cut"))
    refusals.add("captions/c", Refusal("b", Reason.NO_TEXT, "empty"))
    refusals.add("embeddings/t/c", Refusal("b", Reason.NO_TEXT, "no caption"))
    assert refusals.counts() == {"image_broken": 1, "no_text": 2}


def test_the_first_refusal_of_each_reason_is_an_example_without_secrets() -> None:
    teacher = {"class": "tests.helpers.models:TextOnly", "options": {"hf_token": "hf_t0ken-of-eve"}}
    config = parse_config({"source": "x.tar", "output": "out", "teachers": {"t": teacher}})
    refusals = Refusals()
    refusals.add("samples", Refusal("a", Reason.IMAGE_BROKEN, "cut\nby hf_t0ken-of-eve"))
    refusals.add("samples", Refusal("b", Reason.IMAGE_BROKEN, "cut"))
    refusals.add("samples", Refusal(None, Reason.SHARD_DAMAGED, "at byte 9" + "0" * 1000))
    examples = refusals.examples(Redactor(config.model_dump()))
    assert examples.keys() == {"image_broken", "shard_damaged"}
    assert examples["image_broken"].startswith("a: cut by ")
    assert "eve" not in examples["image_broken"]
    assert examples["shard_damaged"].startswith("at byte 9")
    assert len(examples["shard_damaged"]) <= 300


def test_only_a_reason_for_the_whole_shard_refuses_the_shard() -> None:
    refusals = Refusals()
    refusals.add("samples", Refusal("a", Reason.IMAGE_BROKEN, "cut"))
    refusals.add("samples", Refusal(None, Reason.SHARD_DAMAGED, "at byte 9"))
    assert refusals.shard_reason is None, "a damaged shard keeps its readable rows"
    refusals.add("samples", Refusal(None, Reason.SHARD_MISSING, "gone"))
    assert refusals.shard_reason == "shard_missing"


def test_refusals_are_written_to_the_quarantine_of_their_layer_without_secrets(tmp_path: Path) -> None:
    teacher = {"class": "tests.helpers.models:TextOnly", "options": {"hf_token": "hf_t0ken-of-eve"}}
    config = parse_config({"source": "x.tar", "output": str(tmp_path), "teachers": {"t": teacher}})
    store, refusals = Store(config.output), Refusals()
    redact = Redactor(config.model_dump())
    refusals.write(store, "nothing", redact)
    refusals.add("samples", Refusal("a", Reason.IMAGE_BROKEN, "cut"))
    refusals.add("embeddings/t/caption", Refusal("b", Reason.NOT_FINITE, "hf_t0ken-of-eve is invalid"))
    refusals.write(store, "shard", redact)
    assert store.quarantined("samples", "shard") == [{"key": "a", "reason": "image_broken", "detail": "cut"}]
    [row] = store.quarantined("embeddings/t/caption", "shard")
    assert (row["key"], row["reason"]) == ("b", "not_finite")
    assert "eve" not in str(row["detail"])
    assert store.shards("quarantine/samples").keys() == {"shard"}
