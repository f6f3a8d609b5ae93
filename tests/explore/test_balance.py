"""Balanced clusters: equal draws down a tree, whatever does the work and whatever the sizes are."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import reinforce
from reinforce.dataset.view import ViewRows
from reinforce.errors import UserError
from reinforce.explore import duplicates, neighbours, passes
from reinforce.explore.config import SelectConfig
from reinforce.explore.duplicates import fill
from reinforce.settings import parse
from tests.helpers.data import config_of, encode, members_of, write_tar
from tests.helpers.reinforced import reinforce_here
from tests.helpers.views import keys_of, make_view, reasons_of

#: Samples of each colour in each shard: a long tail.
COLOURS = {(230, 20, 20): (9, 8), (20, 230, 20): (4, 3), (20, 20, 230): (1, 2), (230, 230, 230): (0, 1)}
ROWS = 28


def balance(*clusters: int, keep: float, teacher: str = "red") -> dict[str, Any]:
    return {"balance": {"teacher": teacher, "clusters": [*clusters], "keep": keep}}


def shade(colour: tuple[int, int, int], seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(-8, 9, (30, 40, 3))
    return encode(Image.fromarray((np.array(colour) + noise).astype(np.uint8)), "PNG")


def colours_of_rows() -> list[int]:
    return [number for shard in (0, 1) for number, counts in enumerate(COLOURS.values()) for _ in range(counts[shard])]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of plain colours of very different numbers; rows lie by colour."""
    folder = tmp_path_factory.mktemp("colours")
    for shard in (0, 1):
        images = [
            shade(colour, 100 * n + k) for n, (colour, of) in enumerate(COLOURS.items()) for k in range(of[shard])
        ]
        members = members_of(shard, len(images))
        for i, image in enumerate(images):
            members[3 * i] = (members[3 * i][0], image)
        write_tar(folder / "source" / f"{shard}.tar", members)
    plain = {"count": 1, "size": 24, "rand_augment": {"ops": 0}}
    config = config_of(f"{folder}/source/*.tar", folder / "out", captioners={}, augmentations=plain)
    config["teachers"].pop("blue", None)
    return Path(reinforce_here(config))


@pytest.fixture
def url(made: Path, tmp_path: Path) -> str:
    return str(shutil.copytree(made, tmp_path / "out"))


def kept_by_colour(url: str) -> list[int]:
    counts = Counter(n for n, reason in zip(colours_of_rows(), reasons_of(url), strict=True) if reason is None)
    return [counts[number] for number in range(len(COLOURS))]


@pytest.mark.parametrize(("keep", "wanted"), [(10, [3, 3, 3, 1]), (13, [5, 4, 3, 1]), (0.25, [2, 2, 2, 1]), (99, None)])
def test_clusters_keep_equally_many_where_they_have_them(
    url: str, keep: float, wanted: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = np.stack([sample.images["red"].mean(axis=0) for sample in reinforce.open(url)])
    means = np.stack([vectors[np.array(colours_of_rows()) == n].mean(axis=0) for n in range(len(COLOURS))])
    units = (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float32)
    monkeypatch.setattr(neighbours, "train", lambda *_: units)
    view = make_view(url, balance(4, keep=keep), processes=1)
    found = kept_by_colour(url)
    assert sorted(found) == sorted(wanted or [17, 7, 3, 1])
    [line] = view.report
    assert (line["clusters"], line["largest"], line["most"]) == (4, 17, max(found))
    assert line["rows"] - line["left_out"] == len(view) == sum(found)


def test_rare_images_are_kept_more_often_than_by_chance(url: str) -> None:
    found = 0
    for seed in range(10):
        make_view(url, balance(12, 4, keep=10), seed=seed)
        found += sum(kept_by_colour(url)[2:])
    assert found > 20  # of 40 there are; of any ten samples, 14


def brute_force(sizes: np.ndarray, total: int) -> np.ndarray:
    """One sample at a time to the part that has the least, if it has more; of equal ones to the largest."""
    shares = np.zeros(len(sizes), np.int64)
    for _ in range(min(total, int(sizes.sum()))):
        open_ = np.flatnonzero(shares < sizes)
        least = open_[shares[open_] == shares[open_].min()]
        shares[least[np.argmax(sizes[least])]] += 1
    return shares


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_those_of_handing_out_one_after_the_other(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 12, rng.integers(1, 9)) * rng.integers(0, 2, 1)
    for total in (0, 1, 7, 30, 1000):
        found, wanted = fill(sizes, total), brute_force(sizes, total)
        assert sorted(found) == sorted(wanted)
        assert (found <= sizes).all()
        assert found.sum() == min(total, sizes.sum())


def test_a_tree_divides_equally_among_the_branches_and_not_among_the_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six leaves in one corner and two in another: half of the samples come from each corner."""
    rng = np.random.default_rng(0)
    corners = np.repeat(np.eye(2, 8), [6, 2], axis=0) + 0.05 * rng.standard_normal((8, 8))
    centroids = (corners / np.linalg.norm(corners, axis=1, keepdims=True)).astype(np.float32)
    monkeypatch.setattr(duplicates, "_centroids", lambda *_: centroids)
    spec = parse(SelectConfig, {"dataset": "d", "name": "n", "rules": [balance(8, 2, keep=120)]}).rules[0]
    rule = duplicates.BoundRule(1, spec, 0)
    found = duplicates.Balanced(None, {}, rule, duplicates.Buckets(1000, 8, 8), (0,))  # type: ignore[arg-type]
    sizes = np.array([100, 100, 100, 2, 100, 100, 100, 100])
    assert found.divide(sizes).shares.tolist() == [11, 11, 12, 2, 12, 12, 30, 30]


def test_the_same_samples_are_kept_whatever_does_the_work(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [balance(6, 3, keep=12), {"sample": 9}]
    first = make_view(url, *rules)
    alone = reasons_of(url)
    monkeypatch.setattr(passes, "_CHUNK_SHARDS", 1)
    assert make_view(url, *rules, processes=2) == first
    assert reasons_of(url) == alone
    monkeypatch.setattr(duplicates, "_BUCKET_BYTES", 60)
    assert make_view(url, *rules, processes=1) == first  # in this process
    assert reasons_of(url) == alone
    assert make_view(url, *rules, seed=1, processes=1).fingerprint != first.fingerprint
    assert reasons_of(url) != alone


def test_rules_around_it_see_what_is_kept_and_only_that(url: str) -> None:
    colours = np.array(colours_of_rows())
    keys = keys_of(url, view=None)
    of_first = [key for key, colour in zip(keys, colours, strict=True) if colour == 0]
    listed = ", ".join(f"'{key}'" for key in of_first)
    view = make_view(url, f"key NOT IN ({listed})", balance(4, keep=6), {"sample": 3})
    assert [line["rows"] for line in view.report] == [ROWS, 11, 6]
    assert not set(keys_of(url)) & set(of_first)
    assert len(view) == 3


def test_a_killed_selection_continues_with_what_is_finished(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [balance(4, 2, keep=9)]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ViewRows, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            make_view(url, *rules, processes=1)
    with monkeypatch.context() as patched:
        patched.setattr(neighbours, "mean_vectors", killed)  # all vectors have been read
        view = make_view(url, *rules, processes=1)
    assert len(view) == 9


def test_one_cluster_and_equal_images_are_draws_at_random(tmp_path: Path) -> None:
    members = members_of(0, 12)
    for i in range(12):
        members[3 * i] = (members[3 * i][0], shade((90, 90, 90), 0))
    write_tar(tmp_path / "source" / "0.tar", members)
    config = config_of(f"{tmp_path}/source/*.tar", tmp_path / "out", captioners={}, augmentations={"count": 1})
    url = reinforce_here(config)
    assert len(make_view(url, balance(1, keep=5))) == 5
    assert len(make_view(url, balance(5, 2, keep=5))) == 5
    assert len(make_view(url, balance(1, keep=0.01))) == 1


def test_what_cannot_be_clustered_is_refused_before_anything_is_written(url: str) -> None:
    for rule, message in (
        (balance(29, keep=4), "rule 1 balance: 28 samples cannot be 29 clusters. Lower `clusters`."),
        (balance(4, keep=4, teacher="green"), "no teacher 'green' has embedded the images"),
        (balance(4, 4, keep=4), "each level has fewer than the one before it"),
        (balance(2, 4, keep=4), "each level has fewer than the one before it"),
        (balance(0, keep=4), "clusters"),
        (balance(40_000, keep=4), "32768"),
        ({"balance": {"teacher": "red", "clusters": [], "keep": 4}}, "clusters"),
        (balance(4, keep=0), "keep"),
        (balance(4, keep=1.5), "a share is at most 1, got 1.5"),
    ):
        with pytest.raises(UserError, match=message.replace("(", r"\(")):
            make_view(url, rule)
        assert not [path for path in Path(url).glob("views/some/*") if path.name.startswith("rows-")]


def test_samples_without_a_vector_are_left_out_and_counted(tmp_path: Path) -> None:
    members = members_of(0, 12)
    for i in range(12):
        image = b"\x89PNG\r\n\x1a\n broken" if i < 4 else shade((20 * i, 90, 255 - 20 * i), i)
        members[3 * i] = (members[3 * i][0], image)
    write_tar(tmp_path / "source" / "0.tar", members)
    url = reinforce_here(config_of(f"{tmp_path}/source/*.tar", tmp_path / "out", captioners={}))
    rows = len(reasons_of(url)) if make_view(url, balance(3, keep=100)) else 0
    assert rows == len(keys_of(url))
