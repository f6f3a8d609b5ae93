"""Small whole runs: the config of a case of the covering array, and what is done with it."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

import reinforce
from reinforce.config import parse_config
from reinforce.dataset.codecs.base import FittedCodec
from reinforce.dataset.codecs.codebooks import CODECS, find_codec
from reinforce.dataset.codecs.plain import Standardised
from reinforce.dataset.kinds.registry import KINDS
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.store import Store
from reinforce.engine.messages import LayerFailure
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.worker import actor
from reinforce.engine.worker.shard import ShardProcess
from reinforce.errors import UserError
from reinforce.images.backends import BACKENDS
from reinforce.source.config import MODULES
from reinforce.source.formats.base import find_format
from reinforce.storage import Storage
from tests.helpers.arrays import Exclusion
from tests.helpers.commands import exit_status
from tests.helpers.models import classifiers
from tests.helpers.reinforced import reinforce_here
from tests.helpers.worker_in_process import worker_in_process
from tests.pairs.sources import Sample, make_samples, write

DIM = 8  # of the vectors of all teachers
_GROUP_ROWS = 4
_MODELS = "tests.helpers.models"


def _codecs() -> list[str]:
    """A codec of each sort in each type of numbers, of few numbers."""
    names = [name for codec in CODECS for name in codec.example.split(", ")]
    plain = {"float16", "float32", "int8", "float16-int8"}
    return [*dict.fromkeys(name if name in plain else re.sub(r"\d+", "4", name, count=1) for name in names)]


DIMENSIONS: dict[str, list[str]] = {
    "format": [*MODULES],
    "captions": ["none", "partial", "one", "several"],
    "text": ["plain", "odd", "long"],
    "kind": [*KINDS],
    "codec": _codecs(),
    "images": ["embed", "reference"],
    "backend": [*BACKENDS],
    "storage": ["local", "memory", "s3"],
    "resume": ["whole", "killed", "added", "changed", "exchanged", "renamed"],
    "damage": ["none", "broken", "lost", "stray"],
    "nulls": ["none", "nan", "zero"],
    "by": ["worker", "python", "command"],
}
_TABLES = [name for name in MODULES if find_format(name).is_table]
EXCLUDED: list[Exclusion] = [
    {"images": ["reference"], "format": [name for name in MODULES if not find_format(name).referable]},
    {"images": ["reference"], "storage": ["memory"]},  # whose files nobody follows
    {"captions": ["none"], "text": ["odd", "long"]},
    {"captions": ["none"], "kind": ["texts"]},
    {"damage": ["stray"], "format": [name for name in MODULES if name not in _TABLES]},
    {"damage": ["lost"], "format": ["folder"], "storage": ["memory", "s3"]},  # files that are listed can be read there
    {"resume": ["renamed"], "kind": [name for name in KINDS if name != "probabilities"]},
    {"resume": ["exchanged", "renamed"], "format": ["folder"]},  # which is one shard
]
#: CPU seconds that values add to a case.
COSTS: dict[str, dict[str, float]] = {
    "storage": {"s3": 1.9, "memory": 0.0, "local": 0.0},
    "resume": {"whole": 0.0, "renamed": 0.2, "exchanged": 0.45, "added": 0.6, "killed": 0.85, "changed": 0.9},
    "by": {"worker": 0.0, "python": 0.3, "command": 0.3},
}
#: What a config has beside a teacher of images and texts, so that there is a layer of a kind. Of a kind without models
#: of its own nothing; a new kind with models needs its line.
SECTIONS: dict[str, dict[str, Any]] = {
    "samples": {},
    "captions": {"captioners": {"namer": {"class": f"{_MODELS}:SeedCaptioner", "captions": 2}}},
    "probabilities": {"classifiers": {"colors": {"class": f"{_MODELS}.classifiers:Colors", "k": 3}}},
    "images": {"teachers": {"eyes": {"class": f"{_MODELS}:ImageOnly"}}},
    "texts": {"teachers": {"ears": {"class": f"{_MODELS}:TextOnly"}}},
    "patches": {"teachers": {"cells": {"class": f"{_MODELS}.patches:Cells", "options": {"channels": DIM}}}},
    "scores": {
        "scores": {"own": {"class": f"{_MODELS}.scorers:Colors"}, "size": {"facts": ["width", "bytes", "digest_1"]}}
    },
}


@dataclass
class Run:
    """A case, where its source and its dataset are, and what was said in the meantime.

    ``url`` is the dataset, ``other`` one of the same config in a ``folder`` of this machine, made at once by the code
    of workers alone; None where there is none.
    """

    case: Mapping[str, str]
    root: str
    folder: Path
    samples: list[list[Sample]]
    source: Any = None
    spec: Mapping[str, Any] = field(default_factory=dict)
    other: str | None = None
    messages: list[str] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"{self.root}/out"

    @property
    def store(self) -> Store:
        return Store(self.url)

    def config(self, output: str | None = None, complete: bool = True) -> dict[str, Any]:
        """The config; without the section of the case's kind unless it is ``complete``."""
        case = self.case
        options = {"size": 16, "dim": DIM, "nulls": case["nulls"]}
        teacher = {"class": f"{_MODELS}.partial:Partial", "options": options, "codec": case["codec"]}
        sections = {name: {**of} for name, of in SECTIONS[case["kind"]].items()} if complete else {}
        if "cells" in (cells := sections.get("teachers", {})):
            patches = {"grid": 2, "codec": _patch_codec(case["codec"]), "sample": 64}
            cells["cells"] = {**cells["cells"], "patches": patches}
        return {
            "source": self.source,
            "output": output or self.url,
            "input": {**self.spec},
            "images": case["images"],
            "augmentations": {"count": 2, "size": 24, "backend": case["backend"]},
            "workers": {"batch": 4, "max": 1},
            "failures": {"allowed_share": 1.0},
            **sections,
            "teachers": {"red": teacher, **cells},
        }

    def compute(self, output: str | None = None, complete: bool = True, by: str | None = None) -> None:
        """Compute what is missing: by the code of workers alone, or with the driver, from Python or as a command."""
        config = self.config(output, complete)
        if (by or self.case["by"]) == "worker":
            reinforce_here(config, _GROUP_ROWS)
            return
        with worker_in_process(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(actor, "ShardProcess", partial(ShardProcess, group_rows=_GROUP_ROWS))
            if self.case["by"] == "python":
                self.messages.append(reinforce.run(config).text(self.url))
                return
            file = self.folder / "config.yaml"
            file.write_text(yaml.safe_dump(config, sort_keys=False))
            with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as error:
                status = exit_status("run", str(file))
            self.messages += [out.getvalue(), error.getvalue()]
            if status:
                raise UserError(error.getvalue())

    def write(self, files: Mapping[str, bytes]) -> None:
        """Put other content into files of the dataset."""
        for name, content in files.items():
            self.store.fs.pipe_file(f"{self.store.root}/{name}", content)
        self.store.fs.invalidate_cache()

    def write_source(self, version: int = 0) -> None:
        store = Store(f"{self.root}/source")
        if store.fs.exists(store.root):
            store.fs.rm(store.root, recursive=True)
        case = self.case
        repeated = case["resume"] == "exchanged"
        sizes = (5, 5) if repeated else (6, 5)  # a file of the other shard has as many rows, of the same keys
        self.samples = make_samples(case["captions"], case["text"], case["damage"], sizes, repeated, version)
        self.source, self.spec = write(self.root, case["format"], self.samples, case["captions"])


def _patch_codec(name: str) -> str:
    """A codec of patches: with the one for vectors, if that is possible."""
    try:
        Standardised(find_codec(name)).dim(DIM)
    except ValueError:
        return "float16"
    return name


@contextmanager
def small_samples() -> Iterator[None]:
    """Codebooks are fitted to fewer vectors than they have entries: each is repeated."""
    from reinforce.dataset.codecs import plain, quantisers

    fit = quantisers._Quantiser.fit
    with pytest.MonkeyPatch.context() as patch:
        for module in (plain, quantisers):
            patch.setattr(module, "_LEAST_FOR_EACH", 1 / 256)
        patch.setattr(
            quantisers._Quantiser,
            "fit",
            lambda self, sample, seed: fit(self, sample.repeat(-(-256 // len(sample)), axis=0), seed),
        )
        find_codec.cache_clear()
        yield
    find_codec.cache_clear()


class Killed(BaseException):
    """The end of a process, which nothing handles."""


@contextmanager
def killed_after(files: int) -> Iterator[None]:
    """Publishing the file after so many of layers ends the process; the temporary file stays."""
    publish, count = Storage.publish, 0

    def end(self: Storage, file: Any, local_path: str, path: str) -> None:
        nonlocal count
        count += 1
        if count > files:
            raise Killed
        publish(self, file, local_path, path)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(Storage, "publish", end)
        yield
        pytest.fail("the run has ended before")


@contextmanager
def listening(messages: list[str]) -> Iterator[None]:
    """Collect what the package logs."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    listener, logger = Listener(), logging.getLogger("reinforce")
    logger.addHandler(listener)
    try:
        yield
    finally:
        logger.removeHandler(listener)


def perform(case: Mapping[str, str], root: str, folder: Path, number: int) -> Run:
    """Do what a case says; ``number`` decides when a run is killed."""
    run = Run(case, root, folder, [])
    run.write_source()
    with listening(run.messages):
        RESUMES[case["resume"]](run, number)
        plan = make_plan(parse_config(run.config()))
        run.messages += [*plan.notes, *plan.source_notes]
        assert not plan.pending, "everything is computed"
    return run


def _whole(run: Run, number: int) -> None:
    run.compute()
    if run.case["by"] != "worker":
        _compare(run)


def _killed(run: Run, number: int) -> None:
    with killed_after(1 + number % 3):
        run.compute(by="worker")
    files = files_of(run.url)
    for name in files:
        layer, _, file = name.rpartition("/")
        needed = [SAMPLES, "captions/namer"] if layer.endswith("/namer") else [SAMPLES]
        if layer.startswith(("captions/", "embeddings/", "probabilities/", "scores/")):
            assert [one for one in needed if one != layer and f"{one}/{file}" not in files] == [], f"{name} came before"
    run.compute()
    _compare(run)


def _added(run: Run, number: int) -> None:
    """Layers that come later cost those that are there nothing: their files stay as they were written."""
    run.compute(complete=False)
    before = _written(run)
    run.compute()
    after = _written(run)
    assert {name: after[name] for name in before} == before
    _compare(run)


def _changed(run: Run, number: int) -> None:
    """The last shard's images are others when the second run adds a layer; then its samples are dropped, as it says."""
    run.compute(complete=False)
    former = files_of(run.url)
    run.write_source(version=1)
    try:
        run.compute()
    except (UserError, LayerFailure) as error:
        run.messages.append(str(error))
    store = run.store
    shard = max(store.shards(SAMPLES), key=lambda name: _keys(store, name))
    assert exit_status("drop", run.url, SAMPLES, "--shard", shard, "--yes") == 0
    run.compute()
    if not isinstance(find_codec(run.case["codec"]), FittedCodec):  # whose codebook is of the former vectors
        _compare(run)
    kept = files_of(run.url)
    for name, content in former.items():
        if name.startswith("embeddings/") and shard in name and content != kept.get(name):
            _spoil(run, {name: content})


def _exchanged(run: Run, number: int) -> None:
    run.compute()
    kept = files_of(run.url)
    for layer in {name.rpartition("/")[0] for name in kept if name.startswith("embeddings/")}:
        one, other = (name for name in sorted(kept) if name.rpartition("/")[0] == layer)
        if kept[one] != kept[other]:
            _spoil(run, {one: kept[other], other: kept[one]})


def _renamed(run: Run, number: int) -> None:
    """A classifier whose classes are loaded in another order when the rest of its layer is computed."""
    run.compute()
    store = run.store
    shard = max(store.shards(SAMPLES))
    before = files_of(run.url)
    assert exit_status("drop", run.url, "probabilities/colors", "--shard", shard, "--yes") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifiers, "_COLORS", classifiers._COLORS[::-1])
        patch.setattr(classifiers.Colors, "names", classifiers.NAMES[::-1])
        try:
            run.compute()
        except UserError as error:
            run.messages.append(str(error))
    run.compute()
    assert files_of(run.url) == before


#: What is done, by a case's ``resume``.
RESUMES: dict[str, Callable[[Run, int], None]] = {
    "whole": _whole, "killed": _killed, "added": _added, "changed": _changed, "exchanged": _exchanged,
    "renamed": _renamed,
}  # fmt: skip


def _written(run: Run) -> dict[str, Any]:
    """When each file of layers was written."""
    store = run.store
    names = [name for name in files_of(run.url) if name.endswith(".parquet")]
    return {name: store.fs.modified(f"{store.root}/{name}") for name in names}


def _compare(run: Run) -> None:
    run.other = f"{run.folder}/fresh"
    run.compute(run.other, by="worker")


def _spoil(run: Run, files: Mapping[str, bytes]) -> None:
    """Put other content into files, and note whether it is found; then put theirs back."""
    from reinforce.dataset.validate import validate
    from tests.pairs.invariants import read

    kept = files_of(run.url)
    run.write(files)
    found = validate(run.url, processes=1)
    run.messages += found.lines()
    named = {name for name in files if any(name.removesuffix(".parquet") in error for error in found.errors)}
    assert named, f"validate says nothing of {[*files]}"
    with pytest.raises(UserError):
        read(run, strict=True)
    run.write({name: kept[name] for name in files})


def files_of(url: str) -> dict[str, bytes]:
    """The files of a dataset by their paths, without what only runs need."""
    store = Store(url)
    store.fs.invalidate_cache()
    paths = {path.removeprefix(f"{store.root}/"): path for path in store.fs.find(store.root)}
    skipped = ("runs/", ".tmp/", "index/", "set-aside/")
    return {name: store.fs.cat_file(path) for name, path in sorted(paths.items()) if not name.startswith(skipped)}


def _keys(store: Store, shard: str) -> Sequence[str]:
    with store.open_layer(SAMPLES, shard) as file:
        keys: list[str] = file.read(["key"])["key"].to_pylist()
    return keys
