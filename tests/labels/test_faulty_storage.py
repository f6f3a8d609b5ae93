"""Labels in an object store that refuses, loses or cuts their files: waited for, named, and asked for again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import s3fs

import reinforce
from reinforce.config import parse_config
from reinforce.dataset.status import read_status
from reinforce.dataset.store import LayerWriter, Store
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.preflight.check_source import check_source
from reinforce.engine.record import RunSummary
from reinforce.errors import StorageError, UserError
from tests.helpers.data import tree
from tests.helpers.s3_proxy import Proxy, Request, refuse, run_first
from tests.helpers.worker_in_process import worker_in_process
from tests.labels.test_taking import RED, taking, write_copy, write_labels

LABELS = "s3://bucket/labels"
MISSING = refuse(404, "NoSuchKey")
NOTHING: Mapping[str, Any] = {}


@pytest.fixture(scope="module")
def folder(s3: s3fs.S3FileSystem, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of labelled images. The labels are in the store."""
    path = tmp_path_factory.mktemp("labels")
    s3.put(f"{write_labels(path)}/", f"{LABELS}/", recursive=True)
    write_copy(path)
    return path


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, bytes]:
    """The files of an undisturbed run."""
    return files_of(folder, "whole", reinforced(folder, "whole"))


def reinforced(folder: Path, output: str, changes: Mapping[str, Any] = NOTHING, **options: Any) -> RunSummary:
    failures = {"outage_seconds": 5.0, "allowed_share": 0.0}
    own = {"failures": failures, "output": f"{folder}/{output}", **changes}
    config = {**taking(folder, LABELS, teachers={"red": RED}), **own}
    with worker_in_process():  # these are many short runs
        return reinforce.run(config, **options)


def files_of(folder: Path, output: str, summary: RunSummary) -> dict[str, bytes]:
    assert summary.status == 0, summary.message
    return tree(folder / output)


@contextmanager
def losing(s3: s3fs.S3FileSystem, s3_proxy: Proxy, output: Path, part: str, cut: bool = False) -> Iterator[str]:
    """While the block runs, a file of the labels is missing, or ``cut``, as soon as a run has begun to read it."""
    lost = sorted(s3.find(f"{LABELS}/{part.removeprefix('labels/')}"))[0]
    content = s3.cat_file(lost)

    def lose() -> None:
        s3.pipe_file(lost, content[: len(content) // 2]) if cut else s3.rm_file(lost)

    try:
        with s3_proxy.inject(run_first(lose), lambda r: r.key == lost and has_begun(output), 1):
            yield lost.removeprefix("bucket/labels/")
    finally:
        s3.pipe_file(lost, content)


def reads(part: str) -> Callable[[Request], bool]:
    """Whether a request reads a file of the labels."""
    return lambda request: request.key.startswith("bucket/labels/") and part in request.key


def has_begun(output: Path) -> bool:
    """Whether a worker has started, before which a plan reads the labels of some samples."""
    return (output / "dataset.json").exists()


@pytest.mark.parametrize("part", ["dataset.json", "index.json", "shards.parquet", "/uid/", "labels/samples/"])
def test_a_refusal_while_planning_is_an_error_of_the_storage(folder: Path, s3_proxy: Proxy, part: str) -> None:
    with (
        s3_proxy.inject(refuse(403, "AccessDenied", "not for you"), reads(part)) as affected,
        pytest.raises(StorageError, match=r"bucket/labels.* cannot be read: PermissionError: .*; check the storage"),
    ):
        check_source(make_plan(parse_config(taking(folder, LABELS))))
    assert affected


@pytest.mark.parametrize(
    ("part", "times"), [("/uid/", 3), ("index.json", 1), ("labels/samples/", 2), ("embeddings/red/images/", 1)]
)
def test_a_file_of_labels_that_is_missing_for_a_moment_changes_nothing(
    folder: Path, s3_proxy: Proxy, whole: dict[str, bytes], part: str, times: int
) -> None:
    output = part.strip("/").replace("/", "-")
    with s3_proxy.inject(MISSING, lambda r: reads(part)(r) and has_begun(folder / output), times) as affected:
        assert files_of(folder, output, reinforced(folder, output)) == whole
    assert affected


@pytest.mark.parametrize(
    ("fault", "part"),
    [
        ("missing", "labels/samples/"),
        ("cut", "embeddings/red/images/"),
        pytest.param("missing", "captions/", marks=pytest.mark.slow),
        pytest.param("cut", "labels/samples/", marks=pytest.mark.slow),
        pytest.param("missing", "embeddings/red/caption", marks=pytest.mark.slow),
    ],
)
def test_what_stays_missing_is_named_and_read_when_this_is_asked_for(
    folder: Path, s3: s3fs.S3FileSystem, s3_proxy: Proxy, whole: dict[str, bytes], fault: str, part: str
) -> None:
    output = f"{fault}-{part.strip('/').replace('/', '-')}"
    with losing(s3, s3_proxy, folder / output, part, fault == "cut") as name:
        summary = reinforced(folder, output)
        assert (summary.status, summary.refused["labels_unread"] > 0) == (1, True)
        assert name in summary.examples["labels_unread"]
        assert "--retry-quarantined" in summary.text("out")
        again = reinforced(folder, output)
        assert (again.run, again.status) == (None, 1), "nothing else is missing"
        assert "--retry-quarantined" in again.message
        quarantined = read_status(f"{folder}/{output}")["quarantine"]["labels/lab"]
        assert name in quarantined["examples"]["labels_unread (shard)"]
        still = reinforced(folder, output, retry_quarantined=True)
        unread = summary.refused["labels_unread"]  # a shard that read the file at the same moment may be complete
        assert (still.status, still.refused["labels_unread"]) == (1, unread)
        assert not (folder / output / "set-aside").exists(), "nothing has changed"
    assert files_of(folder, output, reinforced(folder, output, retry_quarantined=True)) == whole
    assert reinforced(folder, output, retry_quarantined=True).run is None


def test_a_lost_partition_of_the_index_costs_shards_and_no_labels(
    folder: Path, s3: s3fs.S3FileSystem, s3_proxy: Proxy, whole: dict[str, bytes]
) -> None:
    """Without it, samples would be joined by what is weaker, or not at all."""
    index = Store(LABELS).read_json("identities", "index.json")
    with losing(s3, s3_proxy, folder / "index", f"identities/{index['fingerprint']}/uid"):
        summary = reinforced(folder, "index")
    assert summary.status == 1
    assert "uid/00000.parquet does not exist any more" in summary.examples["shard_failed"]
    assert files_of(folder, "index", reinforced(folder, "index", retry_quarantined=True)) == whole


TEACHER = {"class": "tests.helpers.models:ColorTeacher", "options": {"size": 24, "dim": 4, "seed": 3}}
OTHER = {"teachers": {"own": TEACHER}}
CAPTIONS = {"labels": {"lab": {"url": LABELS, "layers": ["captions/namer"]}}, "teachers": {"own": TEACHER}}


@pytest.mark.parametrize("second", [OTHER, pytest.param(CAPTIONS, marks=pytest.mark.slow)], ids=["crops", "captions"])
def test_layers_of_other_configs_that_depend_on_the_labels_are_computed_again(
    folder: Path, s3: s3fs.S3FileSystem, s3_proxy: Proxy, second: dict[str, Any]
) -> None:
    """A second config has computed vectors on the crops and captions before the labels are read again."""
    first = {key: value for key, value in second.items() if key == "labels"} | {"teachers": {}}
    name = "crops" if second is OTHER else "captions"
    for output in (f"{name}-whole", f"{name}-lost"):
        reading = "samples/" if second is OTHER else "captions/namer/"
        with losing(s3, s3_proxy, folder / f"{name}-lost", reading) if "lost" in output else nullcontext():
            reinforced(folder, output, first)
        reinforced(folder, output, second)
    assert tree(folder / f"{name}-lost") != tree(folder / f"{name}-whole")
    assert reinforced(folder, f"{name}-lost", first, retry_quarantined=True).status == 0
    assert reinforced(folder, f"{name}-lost", second).status == 0
    assert tree(folder / f"{name}-lost") == tree(folder / f"{name}-whole")


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_replaces_files_leaves_none_of_other_samples(
    folder: Path, s3: s3fs.S3FileSystem, s3_proxy: Proxy, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with losing(s3, s3_proxy, folder / "killed", "samples/"):
        reinforced(folder, "killed")
    with monkeypatch.context() as patch:
        patch.setattr(LayerWriter, "commit", mock.Mock(side_effect=UserError("killed")))
        with pytest.raises(UserError, match="killed"):
            reinforced(folder, "killed", retry_quarantined=True)
    kept = tree(folder / "killed")
    shards = {name.rpartition("/")[2] for name in whole if name.startswith("samples/")}
    gone = {shard for shard in shards if f"samples/{shard}" not in kept}
    assert gone
    assert not [name for name in kept if name.rpartition("/")[2] in gone and not name.startswith("quarantine/")]
    assert files_of(folder, "killed", reinforced(folder, "killed", retry_quarantined=True)) == whole
