"""References of `decontaminate`: images without vectors are counted, and vectors may be taken from labels."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reinforce
from reinforce.errors import UserError
from reinforce.publishing.labels import export_labels
from reinforce.selection import neighbours
from reinforce.selection.parts import Parts
from tests.helpers.data import config_of, members_of, picture, write_tar
from tests.helpers.reinforced import reinforce_here
from tests.helpers.views import make_view

ROWS = 12
view_of = functools.partial(make_view, name="mine")


def write_images(path: Path, seeds: list[int | None], shard: int = 0) -> None:
    """Pictures by seed; of None the bytes of an image that cannot be decoded."""
    members = members_of(shard, len(seeds))
    for place, seed in enumerate(seeds):
        image = b"\x89PNG\r\n\x1a\n broken" if seed is None else picture(seed)
        members[3 * place] = (members[3 * place][0], image)
    write_tar(path, members)


def with_teacher(source: Path, output: Path, **changes: Any) -> str:
    config = config_of(str(source), output, captioners={}, **changes)
    config["teachers"].pop("blue", None)
    return reinforce_here(config)


@pytest.fixture
def url(tmp_path: Path) -> str:
    write_images(tmp_path / "0.tar", [*range(ROWS)])
    return with_teacher(tmp_path / "0.tar", tmp_path / "data")


def kept(url: str) -> list[str]:
    return [sample.key for sample in reinforce.open(url, view="mine")]


def rule(*against: str, **changes: Any) -> dict[str, Any]:
    return {"decontaminate": {"against": [*against], "teacher": "red", "threshold": 0.95, **changes}}


def test_images_of_a_reference_that_have_no_vector_are_counted_and_refused_unless_accepted(
    url: str, tmp_path: Path
) -> None:
    write_images(tmp_path / "evaluation.tar", [0, 1, None, 3, None, 5])
    evaluation = with_teacher(tmp_path / "evaluation.tar", tmp_path / "evaluation")
    with pytest.raises(UserError) as raised:
        view_of(url, rule(evaluation))
    assert f"rule 1 decontaminate: samples with the images that have no vector would be kept: {evaluation} has 2 " in (
        str(raised.value)
    )
    assert str(raised.value).endswith("accept this by `without_vectors: 2`.")
    with pytest.raises(UserError, match="without_vectors: 2"):
        view_of(url, rule(evaluation, without_vectors=1))
    view = view_of(url, rule(evaluation, without_vectors=2))
    [line] = view.report
    assert (line["references"], line["without_vectors"]) == (4, 2)


def test_vectors_from_labels_are_references_and_rows_without_labels_are_counted(url: str, tmp_path: Path) -> None:
    write_images(tmp_path / "evaluation.tar", [0, 3, 7])
    evaluation = with_teacher(tmp_path / "evaluation.tar", tmp_path / "evaluation")
    view_of(url, rule(evaluation))
    wanted = kept(url)
    assert 0 < len(wanted) < ROWS
    labels = export_labels(evaluation, f"{tmp_path}/labels", use_ray=False).output
    taken = {"augmentations": {}, "teachers": {}, "labels": {"lab": {"url": labels, "layers": ["embeddings/red"]}}}
    taking = with_teacher(tmp_path / "evaluation.tar", tmp_path / "taking", **taken)
    for reference in (labels, taking):
        view_of(url, rule(reference))
        assert kept(url) == wanted
    write_images(tmp_path / "sources/evaluation.tar", [0, 3, 7])
    write_images(tmp_path / "sources/more.tar", [40, 41], shard=9)
    more = with_teacher(tmp_path / "sources/*.tar", tmp_path / "more", **taken)
    with pytest.raises(UserError, match=r"more has 2 null in embeddings/red/images. `reinforce status` shows why"):
        view_of(url, rule(more))
    view_of(url, rule(more, without_vectors=2))
    assert kept(url) == wanted
    with pytest.raises(UserError, match="rule 1 decontaminate leaves out the last"):  # with equal vectors
        view_of(taking, rule(evaluation, threshold=1.0))


@pytest.mark.parametrize(("count", "dim"), [(500, 32), (500, 768), (neighbours._SEARCH_ALL + 1, 32)])
def test_a_threshold_of_1_finds_equal_vectors_in_float16_and_no_others(tmp_path: Path, count: int, dim: int) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((count, dim))
    units = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    parts = Parts(str(tmp_path), "mine", "0")
    parts.save("stage", 0, {"vectors": units})
    some = units[:500]
    near = some + (0.01 / np.sqrt(dim) * rng.standard_normal(some.shape))  # cosines of about 0.99995
    near = (near / np.linalg.norm(near, axis=1, keepdims=True)).astype(np.float16)
    exact = neighbours.Reference(parts, "stage", 1.0)
    assert exact.contains(some).all()
    assert not exact.contains(near).any()
    assert neighbours.Reference(parts, "stage", 0.9995).contains(near).all()
    twice = np.concatenate([some, some, near])
    places, home, best = np.arange(len(twice)), np.ones(len(twice), np.bool_), np.zeros(len(twice))
    out = neighbours.worse_duplicates(twice, home, best, places, 1.0)
    assert out.tolist() == [False] * 500 + [True] * 500 + [False] * 500
