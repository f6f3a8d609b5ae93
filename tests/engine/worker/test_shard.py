"""One shard through its layers, in this process: its result, the tables of its row groups, what its files contain, and
what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import reinforce
from reinforce.config import parse_config
from reinforce.dataset.store import LayerWriter, Store
from reinforce.engine.messages import ShardResult
from reinforce.engine.plan.plan import build_layers, describe_models, make_plan
from reinforce.engine.worker.decode import Decoded, Row
from reinforce.engine.worker.inference import Batch, Session
from reinforce.engine.worker.models import LoadedModels
from reinforce.engine.worker.producers.base import MisalignedLayer, Refusals, RowGroupTables
from reinforce.engine.worker.producers.registry import make_producers
from reinforce.images.policy import decode
from reinforce.images.records import replay
from reinforce.source.samples import Refusal
from reinforce.source.urls import shard_name
from schemas import WHOLE_SHARD, Reason
from schemas.seeds import seed_for
from teachers.pixels import to_pixels
from teachers.redact import Redactor
from teachers.runtime.accelerator import Accelerator
from tests.helpers.data import config_of, config_of_tar, members_of, tree
from tests.helpers.models import ColorTeacher, GroupCaptioner
from tests.helpers.reinforced import fresh_dataset, reinforce_here, shard_process


def test_a_result_lists_the_committed_layers_their_bytes_and_what_was_refused(tmp_path: Path) -> None:
    members = [member for member in members_of(0, 9) if member[0] != "00000002.txt"]
    members[3] = (members[3][0], members[3][1][:200])
    members[-2] = (members[-2][0], b"caf\xe9")
    result = shard_process(config_of_tar(tmp_path, members), 4).run()
    files = {name: data for name, data in tree(tmp_path / "out").items() if not name.startswith("quarantine")}
    assert {name.rpartition("/")[0] for name in files} == set(result.layers)
    assert (result.samples, result.bytes, result.quarantine_reason) == (8, sum(map(len, files.values())), None)
    assert result.refused == {"image_broken": 1, "no_text": 3}, "one caption is missing, for both teachers"
    assert result.refused_samples == 2
    [path] = (tmp_path / "out/quarantine/embeddings/red/caption").iterdir()
    [row] = pq.read_table(path).to_pylist()
    assert row["detail"] == "no caption to encode: none at input.captions (txt, json:caption)"
    assert 0 < result.busy < result.seconds
    assert result.source_counts == result.event()["source_counts"] == {"captions_replaced": 1}, "it is not UTF-8"
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


@pytest.mark.parametrize("limit", [1000, 2])
def test_a_captioner_may_decode_the_images_of_a_row_group_together_whatever_the_batch(
    limit: int, tmp_path: Path
) -> None:
    def captions(kind: str, batch: int, **options: Any) -> tuple[ShardResult, dict[str, list[str]]]:
        captioner = {"class": f"tests.helpers.models:{kind}", "captions": 2, "options": options}
        folder, changes = tmp_path / f"{kind}{batch}", {"teachers": {}, "workers": {"batch": batch}}
        result = shard_process(config_of_tar(folder, members_of(0, 9), captioners={"c": captioner}, **changes), 4).run()
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


@pytest.mark.parametrize(
    ("dtype", "stored", "tolerance"),
    [("float16", "halffloat", 1e-3), ("float32", "float", 1e-7), ("int8", "int8", 8e-3)],
)
def test_embeddings_equal_the_teachers_for_replayed_augmentations_in_the_configured_dtype(
    shards: Callable[..., str], tmp_path: Path, dtype: str, stored: str, tolerance: float
) -> None:
    config = config_of(shards(20), tmp_path / "out")
    config["teachers"]["red"]["codec"] = dtype
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
        assert sample.metadata["uid"] == sample.key
        seen += 1
    assert seen == 20


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
    members = [*members_of(0, 3), ("bad.png", b"not an image"), ("bad.txt", b"a")]
    config = config_of_tar(tmp_path, members, captioners={})
    store, name = Store(config["output"]), shard_name(config["source"])
    whole = fresh_dataset({**config, "output": str(tmp_path / "whole")})
    for layer in ("samples", "embeddings/red/images"):  # by a run that was killed before it wrote the layers
        store.quarantine(layer, name, [("00000001", Reason.IMAGE_CRASHED, "its decode process died")])
    fresh_dataset(config)
    assert tree(tmp_path / "out") == tree(whole)
    assert [row["key"] for row in store.quarantined("samples", name)] == ["bad"]


def test_a_shard_whose_quarantine_file_is_damaged_is_computed_and_the_file_set_aside(tmp_path: Path) -> None:
    config = config_of_tar(tmp_path, members_of(0, 3), captioners={})
    store, name = Store(config["output"]), shard_name(config["source"])
    store.quarantine("samples", name, [(None, Reason.SHARD_MISSING, "no such file")])
    path = Path(store.layer_path("quarantine/samples", name))
    path.write_bytes(damaged := path.read_bytes()[:-50])
    [file] = make_plan(parse_config(config)).recomputed
    assert file.line().startswith(f"quarantine/samples/{name}.parquet: ")
    fresh_dataset(config)
    assert tree(tmp_path / "out") == tree(fresh_dataset({**config, "output": str(tmp_path / "whole")}))
    [copy] = (tmp_path / "out" / "set-aside").rglob("*.parquet")
    assert copy.read_bytes() == damaged


def table(layer: str, group: RowGroupTables, **changes: Any) -> tuple[pa.Table, Refusals]:
    """The table of a layer of a config with a teacher ``red`` of dimension 8 and 2 augmentations."""
    config = parse_config(config_of("x.tar", "out", **changes))
    models = LoadedModels({"teachers": {"red": ColorTeacher(torch.device("cpu"))}}, Accelerator("cpu"))
    layers = build_layers(config, describe_models(config))
    [producer] = make_producers([layers[layer]], Session(config, models), source="s3://bucket/x.tar")
    [(_, found)] = producer.tables(group)
    return found, producer.refusals


@pytest.mark.parametrize("side", ["images", "caption"])
def test_a_row_whose_decode_process_crashed_has_no_published_vector_and_its_refusal(side: str) -> None:
    name = f"embeddings/old/{side}"
    old = {"family": "published", "model": "OLD", "columns": [0, 8], "logit_scale": 50.0}
    count = 2 if side == "images" else 1
    rows = [
        Row("a", values={name: np.ones((count, 8), np.float32)}, caption="A"),
        Row("b", decoded=Decoded(unreadable=Refusal("b", Reason.IMAGE_CRASHED, "gone"))),
    ]
    found, refusals = table(
        name, RowGroupTables(rows, [], {}), teachers={"old": old}, reinforcements="x.tar", captioners={}
    )
    assert [value is None for value in found["embeddings"].to_pylist()] == [False, True]
    assert refusals.counts() == {"image_crashed": 1}


def test_vectors_are_null_where_an_image_is_unreadable_or_they_are_not_finite_and_both_are_refused() -> None:
    values = np.ones((4, 2, 8), np.float32)
    values[1, 1, 2] = np.nan
    values[2] = np.inf
    rows = [Row(key, None) for key in "abc"] + [
        Row("d", decoded=Decoded(unreadable=Refusal("d", Reason.IMAGE_BROKEN, "gone")))
    ]
    name = "embeddings/red/images"
    found, refusals = table(name, RowGroupTables(rows, [{name: values[:3]}, {name: values[3:]}, {}], {}))
    assert [value is None for value in found["embeddings"].to_pylist()] == [False, True, True, True]
    assert refusals.counts() == {"not_finite": 2, "image_broken": 1}


def test_captions_of_a_row_group_are_decoded_without_the_rows_that_have_labels() -> None:
    config, captioner = parse_config(config_of("x.tar", "out")), GroupCaptioner(torch.device("cpu"))
    layer = build_layers(config, describe_models(config))["captions/namer"]
    layer = replace(layer, labels="those of another run")  # type: ignore[arg-type]
    models = LoadedModels({"captioners": {"namer": captioner}}, Accelerator("cpu"))
    [producer] = make_producers([layer], Session(config, models))
    given = {layer.name: ["one", "two"]}
    batches = [[Row("a"), Row("b", values=given)], [Row("c", values=given)], [Row("d")]]
    outputs = []
    for rows in batches:
        whole = {captioner.image: torch.full((len(rows), 8, 8, 3), 100, dtype=torch.uint8)}
        outputs.append(producer.encode(Batch(rows, "rows", None, whole), producer.prepare(rows))())
    captioner.decoded.clear()
    found = producer.table(layer, RowGroupTables([row for rows in batches for row in rows], outputs, {}))
    texts = found["captions"].to_pylist()
    assert captioner.decoded == [2]
    assert texts[1:3] == [["one", "two"]] * 2
    assert all(text.startswith("a picture of -0.216, seed ") for text in texts[0] + texts[3])
    empty = producer.table(layer, RowGroupTables(batches[1], [{layer.name: [None]}], {}))
    assert empty["captions"].to_pylist() == [["one", "two"]]


def test_stored_captions_must_have_the_keys_of_samples_in_their_order() -> None:
    stored = {"captions/c": pa.table({"key": ["a", "b"], "captions": [["x"], None]})}
    rows = [Row("a"), Row("b")]
    assert RowGroupTables(rows, [], stored).values("captions/c") == [["x"], None]
    with pytest.raises(MisalignedLayer, match=r"captions/c does not have the rows of the samples"):
        RowGroupTables(rows[::-1], [], stored)


def test_a_layer_is_committed_after_those_it_is_computed_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, commit = config_of_tar(tmp_path, members_of(0, 5)), LayerWriter.commit
    needs = {layer.name: layer.needs for layer in shard_process(config).layers.values()}
    for stopped in range(len(needs)):
        committed: list[str] = []

        def commit_some(writer: LayerWriter, *args: Any) -> None:
            if len(committed) == stopped:  # noqa: B023
                raise KeyboardInterrupt
            commit(writer, *args)
            committed.append(writer._parts[0])  # noqa: B023

        monkeypatch.setattr(LayerWriter, "commit", commit_some)
        with pytest.raises(KeyboardInterrupt):
            shard_process({**config, "output": f"{tmp_path}/{stopped}"}).run()
        stored = {name for name in needs if [*Path(tmp_path, str(stopped), name).glob("*.parquet")]}
        assert stored == {*committed}
        assert all({*needs[name]} <= stored for name in stored), "also of what was killed"


@pytest.mark.parametrize("reason", Reason)
def test_a_refusal_without_a_key_is_of_the_whole_shard_for_some_reasons_alone(reason: Reason) -> None:
    refusals = Refusals()
    refusals.add("samples", Refusal(None, reason, "why"))
    assert refusals.shard_reason == (reason.value if reason.value in WHOLE_SHARD else None)


def test_a_shard_that_is_cut_off_keeps_its_samples_before_the_damage(tmp_path: Path) -> None:
    config = config_of_tar(tmp_path, members_of(0, 9))
    path = tmp_path / "source" / "0.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    result = shard_process(config).run()
    assert (result.quarantine_reason, result.refused) == (None, {"image_broken": 1, "shard_damaged": 1})
    assert 0 < result.samples < 9
    assert len([*reinforce.open(reinforce_here(config))]) == result.samples
