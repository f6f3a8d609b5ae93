"""Files of a shard that are not of its samples although their keys are: of an earlier source, or of another shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import reinforce
from reinforce.config import parse_config
from reinforce.dataset.index import set_aside
from reinforce.dataset.manifest import read_manifest
from reinforce.dataset.store import Store, origin_entries, other_origin
from reinforce.dataset.validate import repair, validate
from reinforce.engine.messages import ShardResult
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.recompute import recompute
from reinforce.errors import UserError
from reinforce.explore.report import inspect
from reinforce.publishing.datacompdr import export_datacompdr
from reinforce.publishing.embeddings import export_embeddings
from reinforce.publishing.labels import export_labels
from reinforce.student.config import Data
from reinforce.student.data.datasets import open_datasets
from schemas import Reason
from tests.helpers.data import config_of, members_of, picture, tree, write_tar
from tests.helpers.decoding import decode_pool
from tests.helpers.reinforced import reinforce_here, shard_process
from tests.helpers.views import make_view

RED, TEXTS, CAPTIONS, SCORES = "embeddings/red/images", "embeddings/red/namer", "captions/namer", "scores/length"
LAYERS = (RED, "embeddings/blue/images", "embeddings/red/caption", TEXTS, CAPTIONS, "probabilities/c", SCORES)
ROWS = 4
Reader = Callable[[Path], object]


def config(folder: Path, output: Path | None = None, **changes: Any) -> dict[str, Any]:
    """Two tars with the same name and keys in two folders; the teachers store their vectors in two codecs."""
    base = config_of(f"{folder}/*/0.tar", output or folder / "out")
    base["teachers"]["blue"]["codec"] = "int8"
    classifiers = {"c": {"class": "tests.helpers.models.classifiers:Colors", "k": 2}}
    scores = {"length": {"class": "tests.helpers.models.scorers:Length"}}
    return {**base, "classifiers": classifiers, "scores": scores, **changes}


def write_source(folder: Path, name: str, pictures: int, rows: int = ROWS) -> None:
    """A tar with the keys of shard 0 and the pictures and captions of another one."""
    pairs = zip(members_of(0, rows), members_of(pictures, rows), strict=True)
    write_tar(folder / name / "0.tar", [(member, data) for (member, _), (_, data) in pairs])


def make(folder: Path, **changes: Any) -> Path:
    write_source(folder, "a", 0)
    write_source(folder, "b", 1)
    return Path(reinforce_here(config(folder, **changes), 2))


def shard_of(dataset: Path, folder: str) -> str:
    sources = {path.stem: pq.read_metadata(path).metadata for path in (dataset / "samples").iterdir()}
    [name] = [name for name, footer in sources.items() if f"/{folder}/".encode() in footer[b"reinforce.source"]]
    return name


def exchange(dataset: Path, layer: str) -> None:
    one, other = sorted((dataset / layer).iterdir())
    one.rename(dataset / "kept")
    other.rename(one)
    (dataset / "kept").rename(other)


@pytest.fixture(scope="module", params=["embed", "reference"])
def images(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture(scope="module")
def whole(images: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp(images), images=images)


@pytest.fixture
def dataset(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


@pytest.fixture(scope="module")
def changed(images: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with the files ``old`` of before one of its sources was changed, beside it."""
    folder = tmp_path_factory.mktemp("changed")
    out = make(folder, images=images)
    shutil.copytree(out, folder / "old")
    write_source(folder, "a", 7)
    (out / "samples" / f"{shard_of(out, 'a')}.parquet").unlink()
    reinforce_here(config(folder, images=images), 2)
    assert not validate(str(out)).errors
    return out


def test_exchanged_files_of_shards_with_equal_keys_are_an_error_and_computed_again(
    whole: Path, dataset: Path, images: str
) -> None:
    before = tree(whole)
    for layer in (*LAYERS, "samples"):
        exchange(dataset, layer)
        with pytest.raises(UserError, match=r"(is not of samples/0-\w+\.parquet: )?it is of the source shard "):
            list(reinforce.open(str(dataset), images_from=[str(whole.parent)]))
        for quick in (True, False):
            findings = validate(str(dataset), quick=quick).findings
            assert [one.kind for one in findings] == ["misplaced"] * 2, layer
            assert {one.layer for one in findings} == {layer}
        assert len(repair(str(dataset), findings, [str(whole.parent)]).moved) == 2
        reinforce_here(config(whole.parent, dataset, images=images), 2)
        assert tree(dataset) == before


def test_an_old_file_that_comes_back_after_its_source_has_changed_is_an_error_and_computed_again(
    changed: Path, images: str, tmp_path: Path
) -> None:
    name, before = shard_of(changed, "a"), tree(changed)
    dataset = Path(shutil.copytree(changed, tmp_path / "out"))
    for layer in LAYERS:
        path = dataset / layer / f"{name}.parquet"
        old = changed.parent / "old" / layer / path.name
        assert old.read_bytes() != path.read_bytes()
        shutil.copy(old, path)
        reason = "its first 64 KiB differ" if images == "embed" else "it is of other images"
        with pytest.raises(UserError, match=f"{path.name}.*: it is of .*{reason.rsplit(maxsplit=1)[-1]}"):
            list(reinforce.open(str(dataset), images_from=[str(changed.parent)], strict=True))
        [finding] = validate(str(dataset), quick=True).findings
        assert (finding.kind, finding.layer, finding.shard) == ("misplaced", layer, name)
        assert reason in finding.message
        assert f"reinforce drop {dataset} {layer} --shard {name} --yes" in finding.message
        assert len(repair(str(dataset), [finding]).moved) == 1
        reinforce_here(config(changed.parent, dataset, images=images), 2)
        assert tree(dataset) == before


def test_a_run_replaces_an_old_file_of_another_size_by_itself(changed: Path, images: str, tmp_path: Path) -> None:
    name, before = shard_of(changed, "a"), tree(changed)
    dataset = Path(shutil.copytree(changed, tmp_path / "out"))
    path = dataset / CAPTIONS / f"{name}.parquet"
    shutil.copy(changed.parent / "old" / CAPTIONS / path.name, path)
    size = path.stat().st_size
    with pq.ParquetFile(path) as file:
        groups = [file.read_row_group(group) for group in range(file.num_row_groups)]
        footer = {key: value for key, value in file.metadata.metadata.items() if key.startswith(b"reinforce.")}
        schema = file.schema_arrow.with_metadata(footer)
    with pq.ParquetWriter(path, schema, compression="none") as writer:  # as with old texts of other lengths
        for group in groups:
            writer.write_table(group)
    assert path.stat().st_size != size
    again = config(changed.parent, dataset, images=images)
    [file] = make_plan(parse_config(again)).damaged
    assert (file.layer, file.shard) == (CAPTIONS, name)
    assert file.reason.startswith(("it is of another source file: ", "it is of other images"))
    reinforce_here(again, 2)
    assert tree(dataset) == before


def test_old_samples_that_come_back_alone_are_an_error_until_the_other_layers_are_theirs(
    changed: Path, images: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = shard_of(changed, "a")
    dataset = Path(shutil.copytree(changed, tmp_path / "out"))
    shutil.copy(changed.parent / "old" / "samples" / f"{name}.parquet", dataset / "samples")
    with pytest.raises(UserError, match="it is of "):
        list(reinforce.open(str(dataset), images_from=[str(changed.parent)]))
    findings = validate(str(dataset)).findings
    assert {one.layer for one in findings} == read_manifest(Store(str(dataset)))["layers"].keys() - {"samples"}
    assert {(one.kind, one.shard) for one in findings} == {("misplaced", name)}
    if images == "reference":
        return  # the tar does not have the old images any more
    repair(str(dataset), findings)
    reinforce_here(config(changed.parent, dataset), 2)
    old = tree(changed.parent / "old")
    assert {file: content for file, content in tree(dataset).items() if name in file} == {
        file: content for file, content in old.items() if name in file
    }
    assert not validate(str(dataset)).errors
    assert len(validate(str(dataset), [str(changed.parent)]).changed) == 1


def _train(dataset: Path) -> None:
    data = {"datasets": [str(dataset)], "images_from": [str(dataset.parent)]}
    open_datasets(Data.model_validate(data), 0, None)


def _examples(dataset: Path) -> None:
    examples = reinforce.Examples([str(dataset)], classifiers=["c"], images_from=[str(dataset.parent)])
    [examples[number] for number in range(2 * ROWS)]


def _inspect(dataset: Path) -> None:
    found = inspect(str(dataset), str(dataset.parent / "report"), images_from=[str(dataset.parent)])
    if found.problems:
        raise UserError("it is of the source shard: counted as problems")


READERS: dict[str, tuple[str, Reader]] = {
    "train": (RED, _train),
    "Examples": ("probabilities/c", _examples),
    "inspect": (RED, _inspect),
    "select": (SCORES, lambda dataset: make_view(dataset, "scores.length.letters >= 0")),
    "samples": (CAPTIONS, lambda dataset: reinforce.open(str(dataset)).samples[0]),
    "publish datacompdr": (
        TEXTS,
        lambda dataset: export_datacompdr(str(dataset), f"{dataset}-tars", images=False, use_ray=False),
    ),
    "publish embeddings": (
        RED,
        lambda dataset: export_embeddings(str(dataset), f"{dataset}-vectors", teacher="red", use_ray=False),
    ),
    "publish labels": (CAPTIONS, lambda dataset: export_labels(str(dataset), f"{dataset}-labels", use_ray=False)),
    "recompute": (
        SCORES,
        lambda dataset: recompute(parse_config(config(dataset.parent)), str(dataset), 8, pool=decode_pool()),
    ),
}


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("embedded"))


@pytest.mark.parametrize("name", READERS)
def test_every_reader_of_several_layers_refuses_exchanged_files(embedded: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(embedded.parent, tmp_path / "copy"))
    layer, read = READERS[name]
    exchange(folder / "out", layer)
    with pytest.raises(UserError, match="it is of the source shard "):
        read(folder / "out")


def test_labels_of_a_sample_are_not_taken_from_the_file_of_another_shard(embedded: Path, tmp_path: Path) -> None:
    """Published labels name no source file, but what it is."""
    labels = tmp_path / "labels"
    export_labels(str(embedded), str(labels), use_ray=False)
    assert not validate(str(labels)).errors
    write_source(tmp_path / "x", "a", 0)
    own = config(tmp_path / "x", classifiers={}, scores={}, labels={"published": {"url": str(labels), "layers": [RED]}})
    exchange(labels, RED)
    assert [one.kind for one in validate(str(labels)).findings] == ["misplaced"] * 2
    results: list[ShardResult] = []
    taken = reinforce_here(own, 2, results)
    [example] = [result.examples[Reason.LABELS_UNREAD.value] for result in results]
    assert f"{RED}/{shard_of(embedded, 'a')}.parquet" in example
    assert "is not of samples/0-" in example
    right = [sample.images["red"] for sample in reinforce.open(str(embedded))[shard_of(embedded, "a")]]
    for sample, vectors in zip(reinforce.open(taken), right, strict=True):
        np.testing.assert_array_equal(sample.images["red"], vectors)


def test_vectors_of_captions_are_not_computed_from_the_captions_of_another_shard(whole: Path, dataset: Path) -> None:
    before, again = tree(whole), config(whole.parent, dataset, images=whole.parent.name.rstrip("0"))
    exchange(dataset, CAPTIONS)
    for path in (dataset / TEXTS).iterdir():
        path.unlink()
    result = shard_process(again, 2).run()
    assert (result.layers, [*result.set_aside]) == ((), [CAPTIONS])
    assert result.set_aside[CAPTIONS].startswith("it is of the source shard ")
    reinforce_here(again, 2)
    assert tree(dataset) == before


def test_vectors_of_captions_are_not_computed_from_captions_of_before_the_source_has_changed(tmp_path: Path) -> None:
    """With the samples, whose keys are the same, the vectors of captions are missing, and the captions are not."""
    dataset = make(tmp_path)
    write_source(tmp_path, "a", 7)
    name = shard_of(dataset, "a")
    for layer in ("samples", TEXTS):
        (dataset / layer / f"{name}.parquet").unlink()
    result = shard_process(config(tmp_path), 2).run()
    assert (result.layers, result.set_aside[CAPTIONS]) == (
        (), "it is of another source file: its first 64 KiB differ",
    )  # fmt: skip
    reinforce_here(config(tmp_path), 2)
    fresh = tree(Path(reinforce_here(config(tmp_path, tmp_path / "fresh"), 2)))
    assert {file: content for file, content in tree(dataset).items() if file != "dataset.json"} == {
        file: content for file, content in fresh.items() if file != "dataset.json"
    }


@pytest.mark.parametrize("what", ["images", "captions"])
@pytest.mark.parametrize("kind", ["a folder", "a table of links", "parts of a table"])
def test_the_files_of_changed_samples_replace_those_of_images_in_files_of_their_own_and_of_parts_of_a_table(
    tmp_path: Path, kind: str, what: str
) -> None:
    """No state of one source file covers these samples, whose keys stay the same."""

    def write(pictures: int, text: str) -> None:
        images = [picture(pictures + number) for number in range(ROWS)]
        texts = [f"{text} {number}" for number in range(ROWS)]
        if kind == "parts of a table":
            keys = [str(number) for number in range(ROWS)]
            table = pa.table({"key": keys, "image": images, "caption": texts})
            pq.write_table(table, tmp_path / "x.parquet", row_group_size=2)
            return
        (tmp_path / "files").mkdir(exist_ok=True)
        for number, (image, caption) in enumerate(zip(images, texts, strict=True)):
            (tmp_path / "files" / f"{number}.png").write_bytes(image)
            (tmp_path / "files" / f"{number}.txt").write_text(caption)
        if kind == "a table of links":
            rows = [{"key": str(n), "image": f"files/{n}.png", "caption": caption} for n, caption in enumerate(texts)]
            (tmp_path / "x.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    source = {"a folder": "files", "a table of links": "x.jsonl", "parts of a table": "x.parquet"}[kind]
    write(0, "thing")
    parts = {"rows_per_shard": 2} if kind == "parts of a table" else {}
    again = {**config(tmp_path), "source": str(tmp_path / source), "input": parts}
    dataset = Path(reinforce_here(again, 2))
    old = Path(shutil.copytree(dataset, tmp_path / "old"))
    write(50 if what == "images" else 0, "thing" if what == "images" else "other")
    for path in (dataset / "samples").iterdir():
        set_aside(Store(str(dataset)), "samples", path.stem)
    reinforce_here(again, 2)
    fresh = tree(Path(reinforce_here({**again, "output": str(tmp_path / "fresh")}, 2)))
    assert {file: content for file, content in tree(dataset).items() if file.endswith("parquet")} == {
        file: content for file, content in fresh.items() if file.endswith("parquet")
    }
    name = next((dataset / "samples").iterdir()).name
    shutil.copy(old / CAPTIONS / name, dataset / CAPTIONS / name)
    assert [one.kind for one in validate(str(dataset)).findings] == ["misplaced"]


def test_a_file_of_a_dataset_with_another_seed_is_of_another_recipe(embedded: Path, tmp_path: Path) -> None:
    other = Path(reinforce_here(config(embedded.parent, tmp_path / "other", seed=7), 2))
    dataset = Path(shutil.copytree(embedded, tmp_path / "out"))
    for layer in (RED, CAPTIONS, SCORES):
        name = f"{shard_of(dataset, 'a')}.parquet"
        shutil.copy(other / layer / name, dataset / layer / name)
        with pytest.raises(UserError, match="it was made by another recipe"):
            list(reinforce.open(str(dataset)))
        assert [one.layer for one in validate(str(dataset)).findings] == [layer]
        shutil.copy(embedded / layer / name, dataset / layer / name)


def test_what_one_of_two_files_does_not_record_is_not_compared() -> None:
    """Published labels record no source, and files of tables less than those of tars."""
    footer = {"source": "a.tar", "source_bytes": "9", "source_head": "f", "images_digest": "1"}
    footer["linked_digest"] = "2"
    assert other_origin(footer, footer) is None
    for key in footer:
        assert other_origin(footer, {**footer, key: "0"}) is not None
    for known in ({}, {"source": ""}, {"source_bytes": "9"}, {"images_digest": "1"}, {"source_bytes": "x"}):
        assert other_origin(footer, known) is None
        assert other_origin(known, footer) is None
    assert origin_entries({**footer, "rows": "3"}) == {k: v for k, v in footer.items() if k != "source"}
