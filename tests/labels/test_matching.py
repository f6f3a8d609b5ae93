"""Published samples and samples of the source belong together by what both state of the image."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import reinforce
from reinforce.config import parse_config
from reinforce.engine.messages import ShardResult
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.preflight.check_source import check_source
from reinforce.errors import UserError
from reinforce.labels.index import KINDS, normal_url
from reinforce.labels.joining import Joined, TarRows
from reinforce.labels.members import Wanted
from teachers.published import JOINS
from tests.helpers.images import encode
from tests.helpers.published import (
    ALL,
    check_sample,
    config_of,
    published_members,
    published_sample,
    quarantine,
    source_members,
    write_published,
)
from tests.helpers.reinforced import reinforce_here

URL = "https://example.org/"


#: What a sample "a" and an entry "a" state, and what must allow the join, or why none can.
AGREEMENTS = [
    ({"uid": "u", "digest": "1"}, {"uid": "u", "digest": "2"}, "uid"),  # encoded again
    ({"sha256": "s", "url": "v", "digest": "1"}, {"sha256": "s", "digest": "2"}, "sha256"),
    ({"digest": "1"}, {"digest": "1"}, "digest"),
    ({"url": "v", "digest": "1"}, {"url": "v", "digest": "2"}, "other_image"),  # the URL may have another image now
    ({"url": "v", "sha256": "s"}, {"url": "v", "sha256": "t"}, "other_image"),
    ({"digest": "1", "uid": "u"}, {"digest": "1", "uid": "v"}, "other_image"),
    ({"url": "v", "digest": "1"}, {"url": "v"}, "url"),
    ({"digest": "1"}, {}, "key"),  # each image has a digest, which counts where both state it
    ({"digest": "1"}, {"digest": "2"}, "other_image"),
    ({"url": "v"}, {}, "unconfirmed"),
    ({}, {"uid": "u"}, "unconfirmed"),
    ({}, {}, "key"),
]


@pytest.mark.parametrize(("sample", "entry", "expected"), AGREEMENTS)
def test_no_weaker_agreement_joins_than_the_config_allows_and_a_contradiction_is_no_match(
    sample: dict[str, str], entry: dict[str, str], expected: str
) -> None:
    for number, join in enumerate(JOINS):
        rows = TarRows(join)
        rows.add("a", entry)
        found, other = rows.match([Wanted("a", sample), Wanted("x", {"uid": "a"})])
        if expected in JOINS and JOINS.index(expected) <= number:
            assert found == Joined(0, 0, expected)
        else:
            assert found.what == (expected if expected not in JOINS or join == "key" else found.what)
            assert "'a' is of" in found.detail or "only the key" in found.detail
        assert other.what == "absent", "a uid is no key"


def test_an_entry_whose_text_is_another_one_of_the_same_hash_is_no_candidate() -> None:
    class Colliding(TarRows):
        """Finds all rows for each text, as an index of hashes does that are all equal."""

        def entries(self, kind: str, texts: Sequence[str]) -> dict[str, np.ndarray]:
            return {text: np.arange(len(self.identities)) for text in texts}

    rows = Colliding()
    rows.add("a", {"uid": "u"})
    other, own = rows.match([Wanted("x", {"uid": "v"}), Wanted("y", {"uid": "u"})])
    assert other.what == "absent"
    assert own == Joined(0, 0, "uid")


def test_keys_that_nothing_confirms_are_refused_before_a_run_unless_the_config_joins_by_key(tmp_path: Path) -> None:
    one = published_members(ALL[0], json=None, **{"url.txt": None})
    write_published(tmp_path, [source_members(ALL[0])[:2]], [one])
    with pytest.raises(UserError, match=r"none of the first 1 samples .* set `join: key`"):
        check_source(make_plan(parse_config(config_of(tmp_path))))
    reinforce_here(config_of(tmp_path, join="key"))
    [sample] = reinforce.open(f"{tmp_path}/out")
    check_sample(ALL[0], sample)
    check_source(make_plan(parse_config(config_of(tmp_path))))  # a finished dataset stays valid


def test_urls_are_compared_in_one_spelling() -> None:
    for one, other, same in (
        ("HTTPS://Example.org:443/a b.jpg#top", "https://example.org/a%20b.jpg", True),
        ("http://example.org", "http://example.org/", True),
        ("https://example.org/a?w=1", "https://example.org/a?w=2", False),
        ("https://example.org/A", "https://example.org/a", False),
        ("http://example.org:8080/a", "http://example.org/a", False),
        ("http://[broken/a", "http://[broken/a", True),
        ("http://example.org/\ud800", "http://example.org/\ud800", True),
    ):
        assert (normal_url(one) == normal_url(other)) is same


@pytest.mark.parametrize(
    ("other_url", "other_crops", "reason"),
    [(500, 0, "not_reinforced"), (0, 100, "reinforcement_broken"), (0, 0, None)],
)
def test_a_teacher_added_from_another_set_gets_no_vectors_of_other_images_or_crops(
    tmp_path: Path, other_url: int, other_crops: int, reason: str | None
) -> None:
    """As keys of img2dataset, which are numbers: those of two sets are equal, and their images are not."""
    numbers = range(3)
    source = [source_members(ALL[n], json=json.dumps({"url": f"{URL}{n}"}).encode()) for n in numbers]

    def published(url: int, crops: int) -> list[Any]:
        changed = [ALL[n]._replace(records=published_sample(n + crops).records) for n in numbers]
        return [
            published_members(one, json=None, **{"url.txt": f"{URL}{n + url}".encode()})
            for n, one in zip(numbers, changed, strict=True)
        ]

    write_published(tmp_path, source, published(0, 0))
    first = config_of(tmp_path)
    del first["teachers"]["two"]
    reinforce_here(first)
    write_published(tmp_path, source, published(other_url, other_crops))
    reinforce_here(config_of(tmp_path))
    rows = [sample.images["two"] for sample in reinforce.open(f"{tmp_path}/out")]
    assert [bool(np.isnan(vectors).all()) for vectors in rows] == [reason is not None] * 3
    assert {found for _, found in quarantine(tmp_path, "embeddings/two/images")} == ({reason} - {None})
    assert bool(quarantine(tmp_path, "embeddings/two/caption")) == bool(other_url), "captions have no crops"


def test_a_copy_in_another_order_has_the_labels_of_its_own_images_and_no_others(tmp_path: Path) -> None:
    """Image 0 is missing, image 1 exchanged under the same key, image 2 encoded again; image 3 comes twice."""

    def stated(number: int) -> bytes:
        return json.dumps({"url": f"{URL}{number}"}).encode()

    source = [source_members(ALL[n], f"own{n}", json=stated(n)) for n in range(2, 10)]
    source[0][0] = ("own2.jpg", encode(Image.open(io.BytesIO(source[0][0][1])), "JPEG"))
    source.append(source_members(ALL[1], json=stated(99)))
    source.append(source_members(ALL[3], "again", json=stated(3)))
    random.Random(0).shuffle(source)
    published = [published_members(ALL[n], json=None, **{"url.txt": f"{URL}{n}".encode()}) for n in range(10)]
    write_published(tmp_path, source, published)
    _, notes = check_source(make_plan(parse_config(config_of(tmp_path))))
    results: list[ShardResult] = []
    samples = list(reinforce.open(reinforce_here(config_of(tmp_path), results=results)))
    assert {sample.key for sample in samples} == {ALL[number].key for number in range(2, 10)}
    for sample in samples:
        check_sample(next(one for one in ALL if one.key == sample.key), sample)
    assert results[0].source_counts == {"url": 9, "other_image": 1}
    assert len([note for note in notes if "10 published ones: 9 by url, 1 not (another image); " in note]) == 1
    unused = {(ALL[1].key, "not_reinforced"), (ALL[3].key, "duplicate_key")}
    assert {*quarantine(tmp_path)} == unused | {(ALL[number].key, "no_image") for number in range(2)}


#: What a sample states, several entries, and those of which the first is taken, if any is.
SEVERAL: list[tuple[dict[str, str], dict[str, dict[str, str]], str | None]] = [
    ({"uid": "u", "url": "v"}, {"a": {"uid": "u"}, "b": {"uid": "u", "url": "v"}}, "b"),
    ({"uid": "u", "digest": "2"}, {"a": {"uid": "u", "digest": "1"}, "b": {"uid": "u", "digest": "2"}}, "b"),
    ({"uid": "u", "digest": "3"}, {"a": {"uid": "u", "digest": "1"}, "b": {"uid": "u", "digest": "2"}}, None),
    ({"uid": "u", "sha256": "s"}, {"a": {"uid": "u"}, "b": {"uid": "u", "sha256": "s"}}, "b"),
    ({"uid": "u"}, {"a": {"uid": "u"}, "b": {"uid": "u"}}, None),
    ({"uid": "u"}, {"a": {"uid": "u", "url": "v"}, "b": {"uid": "u", "url": "w"}}, None),
    ({"uid": "u"}, {"a": {"uid": "u", "digest": "1"}, "b": {"uid": "u", "digest": "1"}}, "ab"),  # one image twice
    ({"uid": "u"}, {"a": {"uid": "u", "sha256": "s"}, "b": {"uid": "u", "sha256": "s"}}, "ab"),
    ({"uid": "u", "sha256": "s"}, {"a": {"uid": "u", "sha256": "t"}, "b": {"uid": "u"}}, "b"),  # not a, which differs
    ({"url": "v"}, {"a": {"url": "v"}, "b": {"url": "v"}}, None),
    ({"digest": "1"}, {"a": {"digest": "1", "uid": "u"}, "b": {"digest": "1", "uid": "w"}}, "ab"),
    ({"uid": "u"}, {str(n): {"uid": "u", "digest": "1"} for n in range(20)}, None),  # too many to compare
    ({"uid": "u", "url": "v"}, {str(n): {"uid": "u"} for n in range(20)} | {"b": {"uid": "u", "url": "v"}}, "b"),
]


@pytest.mark.parametrize(("sample", "entries", "expected"), SEVERAL)
def test_of_several_entries_the_one_that_agrees_in_more_is_taken_and_otherwise_none(
    sample: dict[str, str], entries: dict[str, dict[str, str]], expected: str | None
) -> None:
    for order in (entries, dict(reversed(entries.items()))):
        rows = TarRows()
        for key, one in order.items():
            rows.add(key, one)
        found = rows.match([Wanted("x", sample)])[0]
        if expected is None:
            assert (found.what, "several have its u" in found.detail) == ("ambiguous", True)
        else:
            assert [*order][found.row] == next(key for key in order if key in expected)


STATEMENTS = st.fixed_dictionaries({}, optional={kind: st.sampled_from("ab") for kind in ("uid", "sha256", "url")})


@given(STATEMENTS, st.lists(STATEMENTS, max_size=5), st.sampled_from(JOINS))
def test_what_is_joined_agrees_in_the_strongest_allowed_kind_and_contradicts_nothing(
    sample: dict[str, str], entries: list[dict[str, str]], join: str
) -> None:
    rows = TarRows(join)
    for number, one in enumerate(entries):
        rows.add(str(number), one)
    allowed = [kind for kind in KINDS if JOINS.index(kind) <= JOINS.index(join)]
    agreeing = [[kind for kind in allowed if kind in sample and sample[kind] == one.get(kind)] for one in entries]
    contradicted = [any(sample[kind] != one[kind] for kind in sample.keys() & one.keys()) for one in entries]
    fitting = [number for number in range(len(entries)) if agreeing[number] and not contradicted[number]]
    found = rows.match([Wanted("x", sample)])[0]
    if isinstance(found, Joined):
        assert found.row in fitting
        assert found.kind == min((agreeing[number][0] for number in fitting), key=KINDS.index)
        assert found.kind in agreeing[found.row]
    else:
        assert (len(fitting) > 1) if found.what == "ambiguous" else not fitting
