"""An identity that several rows of labels state joins a sample only with the row that other identities show."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import reinforce
from reinforce.config import parse_config
from reinforce.dataset.files.store import Store
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.record.summary import source_lines
from reinforce.labels.identities import DIGEST, Identity
from reinforce.labels.index import open_index
from reinforce.labels.interface import Wanted
from reinforce.labels.joining import Joined, TarRows, proves
from reinforce.labels.rows import open_labels
from reinforce.publishing.labels import export_labels
from reinforce.source.references import image_digest
from tests.helpers.data import config_of, picture, tree, write_tar
from tests.helpers.reinforced import reinforce_here
from tests.labels.test_taking import dataset_of, publish, sample, smaller, take, taking

COUNT, UIDS = 40, 17


def write(folder: Path, images: bool = False, uids: int = UIDS) -> str:
    """Labels of 40 images in two shards, or a dataset with its ``images``, with ``uids`` distinct uids."""
    shards = [
        [one for n in range(start, start + 20) for one in sample(n, f"{n:05d}", uid=f"uid{n % uids}")]
        for start in (0, 20)
    ]
    return publish(folder, *shards, indexed=images)


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(("images", "uids"), [(False, UIDS), (True, UIDS), (False, 1)])
def test_where_nothing_shows_it_none_is_taken(tmp_path: Path, images: bool, uids: int, earlier: bool) -> None:
    url = write(tmp_path, images, uids)
    if earlier:
        forget_repeated(url)
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


def forget_repeated(url: str) -> None:
    """Make an index one of an earlier version."""
    path = Path(url, "identities/index.json")
    description = json.loads(path.read_text())
    del description["repeated"]
    path.write_text(json.dumps(description))


def test_exports_and_indexes_report_repeated_identities_also_of_earlier_labels(tmp_path: Path) -> None:
    url = write(tmp_path)
    assert open_index(Store(url)).repeated == {"uid": COUNT}
    before = tree(Path(url), layers_only=False)
    forget_repeated(url)
    assert open_index(Store(url)).repeated is None
    again = export_labels(str(tmp_path / "dataset"), url, use_ray=False)
    assert any(line.startswith("repeated: uid of 40: other samples state the same") for line in again.lines())
    assert tree(Path(url), layers_only=False) == before
    assert "repeated" not in "".join(export_labels(unique(tmp_path), f"{tmp_path}/unique", use_ray=False).lines())


def unique(folder: Path) -> str:
    write_tar(folder / "one" / "0.tar", sample(1, "one"))
    return reinforce_here(config_of(f"{folder}/one/*.tar", folder / "one-dataset", teachers={}))


def test_keys_that_repeat_in_shards_join_nothing(tmp_path: Path) -> None:
    shards = [[one for n in range(3) for one in sample(10 * s + n, f"{n + s:05d}")[:2]] for s in range(2)]
    url = publish(tmp_path, *shards, identities=["uid"])
    assert open_index(Store(url)).repeated == {"key": 4}
    write_tar(tmp_path / "copy" / "0.tar", [one for n in range(3) for one in sample(n, f"{n:05d}")[:2]])
    labels = {"lab": {"url": url, "layers": ["captions/namer"], "join": "key"}}
    taken, counts = take(taking(tmp_path, url, labels=labels))
    assert {number for number, one in taken.items() if one.captions.get("namer")} == {0}
    assert counts == {"labels.lab.key": 1, "labels.lab.ambiguous": 2}


def said_of(rng: random.Random, few: int) -> tuple[int, dict[str, str]]:
    """The number of an image, and what is stated of it: few values of each kind, or none."""
    kinds = [kind for kind in ("uid", "sha256", "url") if rng.random() < 0.6]
    return rng.randrange(few), {kind: f"https://example.org/{kind}{rng.randrange(few)}" for kind in kinds}


def identity(image: int, said: dict[str, str]) -> Identity:
    return {**said, DIGEST: f"{image_digest(picture(image)):016x}"}


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
