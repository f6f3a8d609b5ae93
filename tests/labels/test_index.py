"""The index of identities finds the rows that a scan of all samples finds, whatever is built, kept or damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import schemas
from reinforce.dataset.store import Store
from reinforce.errors import UserError
from reinforce.labels import building
from reinforce.labels.building import build_index
from reinforce.labels.index import IdentityIndex, find_index, hash_identities, identities, open_index
from tests.helpers.data import config_of, members_of, picture, tree, write_tar
from tests.helpers.reinforced import reinforce_here

ROWS = 24
REPEATED = {"digest": 4, "url": 2}  # of two images and a URL that the last shard has again


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards. In the last one, a URL is that of another sample, and nothing is stated of one."""
    folder = tmp_path_factory.mktemp("index")
    for shard in range(2):
        write_tar(folder / "source" / f"{shard}.tar", members_of(shard, 11))
    again = json.dumps({"uid": "again", "url": "HTTPS://example.org:443/00100003", "sha256": "AB" * 32}).encode()
    write_tar(folder / "source" / "2.tar", [("one.png", picture(7)), ("one.json", again), ("two.png", picture(8))])
    return Path(reinforce_here(config_of(f"{folder}/source/*.tar", folder / "out", teachers={}, captioners={})))


def build(dataset: Path) -> IdentityIndex:
    return build_index(str(dataset), use_ray=False)


def scanned(dataset: Path, index: IdentityIndex) -> dict[str, set[tuple[int, int, int]]]:
    """(hash, number of the shard, row) of every identity, by kind, by reading all samples."""
    found: dict[str, set[tuple[int, int, int]]] = {}
    for number, shard in enumerate(index.shards):
        with Store(str(dataset)).open_layer("samples", shard) as file:
            for kind, values in identities(file.read()).items():
                pairs = zip(*hash_identities(kind, values), strict=True)
                found.setdefault(kind, set()).update((int(one), number, int(row)) for one, row in pairs)
    return found


def indexed(index: IdentityIndex) -> dict[str, set[tuple[int, int, int]]]:
    every = {}
    for kind in index.kinds:
        layer, parts = f"{index.folder}/{kind}", []
        for name in index.store.shards(layer):
            with index.store.open_layer(layer, name) as file:
                parts.append(file.read(schemas.IDENTITIES_SCHEMA.names).to_pydict())
        assert all(part["hash"] == sorted(part["hash"]) for part in parts)
        every[kind] = {entry for part in parts for entry in zip(*part.values(), strict=True)}
    return every


@pytest.mark.parametrize("rows", [2**20, 3])  # of a part: all shards in one, or each in its own and 8 partitions
def test_the_index_has_every_identity(dataset: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(building, "PART_ROWS", rows)
    index = build(dataset)
    assert index.bits == (0 if rows > ROWS else 3)
    expected = scanned(dataset, index)
    found = indexed(index)
    assert found.pop("key") == {(*hash_identities("key", pa.array(["two"]))[0].tolist(), 2, 1)}
    assert found == expected
    assert index.kinds == {"uid": 23, "sha256": 1, "digest": 24, "url": 23, "key": 1}
    assert index.repeated == REPEATED
    for kind, entries in expected.items():
        hashes = np.array([*{entry[0] for entry in entries}, 5], np.uint64)[::-1].copy()
        places, shards, of_shards = index.lookup(kind, hashes)
        assert {(int(hashes[p]), int(s), int(r)) for p, s, r in zip(places, shards, of_shards, strict=True)} == entries
    assert index.row_group(1, 9) == (1, 1)  # row groups of 8
    with pytest.raises(UserError, match="names row 11 of shard 1, which has none"):
        index.row_group(1, 11)


def test_a_killed_build_continues_and_a_second_writes_nothing(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "PART_ROWS", 3)
    written: list[str] = []
    merge = building.merge_partition

    def killed(build: building.Build, number: str) -> dict[str, int]:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(number)
        return merge(build, number)

    with monkeypatch.context() as patch:
        patch.setattr(building, "merge_partition", killed)
        shutil.rmtree(dataset / "identities", ignore_errors=True)
        with pytest.raises(KeyboardInterrupt):
            build(dataset)
    assert find_index(Store(str(dataset))) is None
    kept = {name: (dataset / name).stat().st_mtime_ns for name in tree(dataset) if name.startswith("identities/")}
    index = build(dataset)
    assert indexed(index).keys() == {"uid", "sha256", "digest", "url", "key"}
    assert index.kinds["digest"] == ROWS  # also of the partitions that were kept
    assert index.repeated == open_index(Store(str(dataset))).repeated == REPEATED
    now = {name: (dataset / name).stat().st_mtime_ns for name in tree(dataset) if name.startswith("identities/")}
    assert {name: now[name] for name in kept if name in now}.items() <= kept.items()
    assert not any("/parts/" in name for name in now)
    build(dataset)
    assert now == {name: (dataset / name).stat().st_mtime_ns for name in now}


def test_what_somebody_else_has_changed_is_refused_with_the_remedy(dataset: Path) -> None:
    index = build(dataset)
    store = Store(str(dataset))
    description = json.loads((dataset / "identities" / "index.json").read_text())
    path = dataset / "identities" / index.fingerprint / "uid" / "00000.parquet"
    content = path.read_bytes()
    hashes = np.array([entry[0] for entry in indexed(index)["uid"]], np.uint64)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"fingerprint": "../../etc"}, "is damaged"),
        ({"bits": 60}, "is damaged"),
        ({"repeated": {"uid": "x"}}, "is damaged"),
        ({"repeated": [1]}, "is damaged"),
        ({"version": 99}, "Upgrade"),
        ({"format": "x"}, "does not describe an index"),
        ({"samples": "0" * 16}, "is not of the shards beside it"),
        ({"fingerprint": "0" * 16}, "is missing"),
    ]
    for change, message in changes:
        store.write_json({**description, **change}, "identities", "index.json")
        with pytest.raises(UserError, match=message):
            open_index(store)
    store.write_json(description, "identities", "index.json")
    path.write_bytes(content[:40] + b"\xff" + content[41:])
    with pytest.raises(UserError, match=r"00000.parquet is damaged .* Make it again"):
        open_index(store).lookup("uid", hashes)
    path.write_bytes(content)
    assert len(open_index(store).lookup("uid", hashes).rows) == index.kinds["uid"]
