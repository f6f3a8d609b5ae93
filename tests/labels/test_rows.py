"""Rows of labels: of several with one identity that which others show is joined, and reading costs little.

A row group is read once, whether it is refused or fills the cache, and a plan reads no values.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import reinforce
from reinforce.config import parse_config
from reinforce.dataset.layer_file import LayerFile
from reinforce.dataset.store import Store
from reinforce.engine.plan.plan import Plan, make_plan
from reinforce.engine.preflight.check_source import check_source
from reinforce.engine.record import source_lines
from reinforce.labels import index, joining, rows
from reinforce.labels.index import DIGEST, Identity, hash_text, open_index
from reinforce.labels.joining import Joined, TarRows, proves
from reinforce.labels.members import RowLabels, Wanted
from reinforce.labels.rows import open_labels
from reinforce.publishing.labels import export_labels
from reinforce.source.samples import Refusal
from reinforce.source.urls import digest_of
from schemas import Reason
from tests.helpers.data import picture, tree, write_tar
from tests.labels.test_taking import dataset_of, publish, sample, samples_of, smaller, take, taking

COUNT, UIDS = 40, 17


def write(folder: Path, images: bool = False, uids: int = UIDS) -> str:
    """Labels of 40 images in two shards, or a dataset with its ``images``, with ``uids`` distinct uids."""
    shards = [
        [one for n in range(start, start + 20) for one in sample(n, f"{n:05d}", uid=f"uid{n % uids}")]
        for start in (0, 20)
    ]
    return publish(folder, *shards, indexed=images)


@pytest.mark.parametrize(("images", "uids"), [(False, UIDS), (True, UIDS), (False, 1)])
def test_where_nothing_shows_it_none_is_taken(tmp_path: Path, images: bool, uids: int) -> None:
    url = write(tmp_path, images, uids)
    numbers = random.Random(1).sample(range(COUNT), COUNT)
    copy = [one for n in numbers for one in sample(n, f"own{n}", smaller(picture(n)), uid=f"uid{n % uids}")]
    write_tar(tmp_path / "copy" / "0.tar", copy)
    taken, counts = take(taking(tmp_path, url))
    assert not any(one.captions.get("namer") for one in taken.values())
    assert counts == {"labels.lab.ambiguous": COUNT}
    assert source_lines(counts) == ["samples joined with labels lab: 40 not (ambiguous: several rows state the same)"]
    files = Path(tmp_path, "out/quarantine").rglob("*.parquet")
    details = {detail for path in files for detail in pq.read_table(path)["detail"].to_pylist()}
    assert details == {"labels: several have its uid, and nothing else that both sides state distinguishes them"}


def test_exports_and_indexes_report_repeated_identities(tmp_path: Path) -> None:
    url = write(tmp_path)
    assert open_index(Store(url)).repeated == {"uid": COUNT}
    before = tree(Path(url), layers_only=False)
    again = export_labels(str(tmp_path / "dataset"), url, use_ray=False)
    assert any(line.startswith("repeated: uid of 40: other samples state the same") for line in again.lines())
    assert tree(Path(url), layers_only=False) == before
    one = publish(tmp_path / "one", sample(1, "one"), indexed=True)
    assert "repeated" not in "".join(export_labels(one, f"{tmp_path}/unique", use_ray=False).lines())


def test_keys_that_repeat_in_shards_join_nothing(tmp_path: Path) -> None:
    shards = [[one for n in range(3) for one in sample(10 * s + n, f"{n + s:05d}")[:2]] for s in range(2)]
    url = publish(tmp_path, *shards, identities=["uid"])
    assert open_index(Store(url)).repeated == {"key": 4}
    write_tar(tmp_path / "copy" / "0.tar", [one for n in range(3) for one in sample(n, f"{n:05d}")[:2]])
    labels = {"lab": {"url": url, "layers": ["captions/namer"], "join": "key"}}
    taken, counts = take(taking(tmp_path, url, labels=labels))
    assert {number for number, one in taken.items() if one.captions.get("namer")} == {0}
    assert counts == {"labels.lab.key": 1, "labels.lab.ambiguous": 2}


@pytest.mark.parametrize("named", [{"title": "x"}, {}])
def test_rows_whose_keys_or_uids_have_one_hash_join_the_samples_with_their_own_alone(
    tmp_path: Path, named: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples state keys alone, or uids and URLs; the last two of the copy are in no row."""

    def two_hashes(text: str) -> int:
        return hash_text(text) & 1

    for module in (index, joining):
        monkeypatch.setattr(module, "hash_text", two_hashes)
    members = [one for n in range(12) for one in sample(n, f"{n:05d}", **named)]
    url = publish(tmp_path, members, identities=["uid", "url"])
    copy = [one for n in range(14) for one in sample(n, f"{n:05d}", smaller(picture(n)), **named)]
    write_tar(tmp_path / "copy" / "0.tar", copy)
    labels = {"lab": {"url": url, "layers": ["captions/namer"], "join": "key"}}
    taken, counts = take(taking(tmp_path, url, labels=labels))
    assert counts == {f"labels.lab.{'key' if named else 'uid'}": 12, "labels.lab.absent": 2}
    own = {one.key: one.captions["namer"] for one in reinforce.open(dataset_of(url))}
    assert {one.key: one.captions.get("namer") or [] for one in taken.values()} == {
        f"{n:05d}": own.get(f"{n:05d}", []) for n in range(14)
    }


def said_of(rng: random.Random, few: int) -> tuple[int, dict[str, str]]:
    """The number of an image, and what is stated of it: few values of each kind, or none."""
    kinds = [kind for kind in ("uid", "sha256", "url") if rng.random() < 0.6]
    return rng.randrange(few), {kind: f"https://example.org/{kind}{rng.randrange(few)}" for kind in kinds}


def identity(image: int, said: dict[str, str]) -> Identity:
    return {**said, DIGEST: f"{digest_of(picture(image)):016x}"}


@pytest.mark.parametrize(("seed", "few"), [(0, 5), (1, 5), (2, 20), (3, 20)])
@pytest.mark.parametrize("images", [False, True])
def test_labels_join_as_by_a_comparison_with_all_rows(tmp_path: Path, images: bool, seed: int, few: int) -> None:
    rng = random.Random(seed)
    rows = {f"row{n}": said_of(rng, few) for n in range(48)}
    every = TarRows()
    members = []
    for key, (image, said) in rows.items():
        every.add(key, identity(image, said))
        members.append(sample(image, key, **{"title": "x", **said}))
    shards = [[one for three in members[shard::3] for one in three] for shard in range(3)]
    url = publish(tmp_path, *shards, indexed=images, teachers={})
    by_captions = {tuple(one.captions["namer"]): one.key for one in reinforce.open(dataset_of(url))}
    own = [said_of(rng, few + 3) for _ in range(200)]
    labels = {"lab": {"url": url, "layers": ["captions/namer"]}}
    source = f"{tmp_path}/images/*.tar"  # of which nothing is read
    plan = make_plan(parse_config({**taking(tmp_path, url, labels=labels), "source": source}))
    with contextlib.closing(open_labels(plan.config, plan.layers.values())) as reader:
        found = reader.find([Wanted(f"own{n}", said, picture(image)) for n, (image, said) in enumerate(own)])
    joined = possible = ambiguous = 0
    for (image, said), [one] in zip(own, found, strict=True):
        expected = every.match([Wanted("", stated := identity(image, said))])[0]
        value = one.values["captions/namer"]
        assert isinstance(value, list) <= isinstance(expected, Joined), stated
        joined += isinstance(value, list)
        possible += isinstance(expected, Joined)
        ambiguous += not isinstance(expected, Joined) and expected.what == "ambiguous"
        if isinstance(value, list) and isinstance(expected, Joined):
            of, named = identity(*rows[row := by_captions[tuple(value)]]), [*rows][expected.row]
            assert row == named or proves(stated, of) or proves(of, identity(*rows[named]))
    # The digests of two images in a dataset are not compared with each other.
    assert joined >= (0.9 if images else 1) * possible
    assert ambiguous


READ = 16


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """Labels of 16 images in two row groups, and a copy of the images."""
    members = samples_of(range(READ))
    write_tar(tmp_path / "copy" / "0.tar", members)
    return Path(publish(tmp_path, members))


def plan_of(labels: Path) -> Plan:
    return make_plan(parse_config(taking(labels.parent, str(labels))))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[Any, int]]:
    """How often each row group of a file was read."""
    counted: Counter[tuple[Any, int]] = Counter()
    read: Callable[..., pa.Table] = LayerFile.read_row_group

    def counting(self: LayerFile, number: int, *args: Any, **options: Any) -> pa.Table:
        counted[self._name, number] += 1
        return read(self, number, *args, **options)

    monkeypatch.setattr(LayerFile, "read_row_group", counting)
    return counted


def find(plan: Plan) -> tuple[list[RowLabels], dict[str, int]]:
    """The labels of the copy, in two batches."""
    stated = [{"uid": f"uid{n}", "url": f"https://example.org/{n}"} for n in range(READ)]
    wanted = [Wanted(f"own{n}", one, picture(n)) for n, one in enumerate(stated)]
    with contextlib.closing(open_labels(plan.config, plan.layers.values())) as reader:
        found = [one for part in (wanted[::2], wanted[1::2]) for [one] in reader.find(part)]
        return found, reader.counts


def rewrite(path: Path, column: str, values: pa.Array | None = None, rows: int = READ) -> None:
    """Write some ``rows`` of a file again, with other values of a column."""
    with pq.ParquetFile(path) as file:
        table, metadata = file.read(), file.metadata.metadata
    if values is not None:
        table = table.set_column(table.schema.get_field_index(column), pa.field(column, values.type), values)
    table = table.slice(0, rows).replace_schema_metadata(None)
    options: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "store_schema": False}
    with pq.ParquetWriter(path, table.schema, **options) as writer:
        writer.write_table(table, row_group_size=8)
        writer.add_key_value_metadata(metadata)


def damage(path: Path, column: str) -> None:
    """Damage the pages of a column of text."""
    rewrite(path, column, rows=READ)
    metadata, content = pq.read_metadata(path), bytearray(path.read_bytes())
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        leaf = next(one for one in map(group.column, range(group.num_columns)) if one.path_in_schema == column)
        content[leaf.data_page_offset + leaf.total_compressed_size - 20] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("column", ["url", "caption"])
def test_a_refused_group_of_samples_is_read_once(labels: Path, reads: Counter[tuple[Any, int]], column: str) -> None:
    [path] = labels.glob("samples/*.parquet")
    damage(path, column)
    plan = plan_of(labels)
    reads.clear()
    found, counts = find(plan)
    assert sum(counts.values()) == READ
    assert [reads[("samples", path.stem), group] for group in range(2)] == [1, 1]
    values = [value for one in found for value in one.values.values()]
    broken = [isinstance(value, Refusal) and value.reason is Reason.REINFORCEMENT_BROKEN for value in values]
    assert all(broken) if column == "url" else any(broken)


def test_refused_row_groups_of_a_layer_are_read_once_and_cost_it(labels: Path, reads: Counter[tuple[Any, int]]) -> None:
    [path] = labels.glob("embeddings/red/images/*.parquet")
    rewrite(path, "embeddings", pa.array([np.zeros(1000, np.float16)] * READ))
    plan = plan_of(labels)
    reads.clear()
    found, counts = find(plan)
    assert counts == {"labels.lab.uid": READ}
    assert [reads[("embeddings/red/images", path.stem), group] for group in range(2)] == [1, 1]
    for one in found:
        assert "not every vector" in one.values["embeddings/red/images"].detail
        assert isinstance(one.values["embeddings/blue/images"], np.ndarray)


def test_row_groups_that_fill_the_cache_are_read_once_a_batch(
    labels: Path, reads: Counter[tuple[Any, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_CACHED_BYTES", 1)
    plan = plan_of(labels)
    reads.clear()
    find(plan)
    [stem] = (path.stem for path in labels.glob("samples/*.parquet"))
    layers = [name for name in plan.layers if name != "samples"]
    most = {name: max(count for (file, _), count in reads.items() if file == (name, stem)) for name in layers}
    assert most == dict.fromkeys(layers, 2)  # batches


def test_rows_that_a_file_lacks_are_broken_labels(labels: Path) -> None:
    [path] = labels.glob("samples/*.parquet")
    rewrite(path, "key", rows=5)
    _, counts = find(plan_of(labels))
    assert counts == {"labels.lab.uid": 5, "labels.lab.broken": 11}


#: Lives as long as the process: tables of this pool that are freed after it end the process.
DEFAULT = pa.default_memory_pool()
POOL = pa.proxy_memory_pool(DEFAULT)


def test_a_plan_reads_no_captions(labels: Path) -> None:
    for path, column, type_ in (
        (*labels.glob("samples/*.parquet"), "caption", pa.string()),
        (*labels.glob("captions/namer/*.parquet"), "captions", pa.list_(pa.string())),
    ):
        text = "x" * 10_000_000
        rewrite(path, column, pa.array([text if column == "caption" else [text] * 2] * READ, type_))
    plan = plan_of(labels)
    pa.set_memory_pool(POOL)
    try:
        _, notes = check_source(plan)
    finally:
        pa.set_memory_pool(DEFAULT)
    assert any(f"{READ} by uid" in note for note in notes)
    assert 0 < POOL.max_memory() < 5_000_000
