"""Duplicates within a dataset and of other datasets: found as by comparing all pairs, whatever does the work.

References of `decontaminate`: images without vectors are counted, and vectors may be taken from labels.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reinforce
from reinforce.config import Config
from reinforce.dataset.view import ViewRows
from reinforce.engine.messages import ShardResult
from reinforce.errors import UserError
from reinforce.explore import neighbours, passes
from reinforce.explore import rules as selection_rules
from reinforce.explore.config import SelectConfig
from reinforce.explore.parts import Parts
from reinforce.explore.select import select
from reinforce.publishing.labels import export_labels
from reinforce.settings import parse
from tests.helpers.data import config_of, members_of, picture, write_tar
from tests.helpers.reinforced import manifest_to_change, reinforce_here
from tests.helpers.views import keys_of, make_view, reasons_of

ROWS = 16
NEAR = {"teacher": "red", "threshold": 0.97}
WORDS = "scores.sizes.words"


def write_images(path: Path, seeds: Sequence[int | None], shard: int = 0) -> None:
    """Samples with pictures by seed, of None an image that cannot be decoded, and texts of several lengths."""
    members = members_of(shard, len(seeds))
    for i, seed in enumerate(seeds):
        image = b"\x89PNG\r\n\x1a\n broken" if seed is None else picture(seed)
        members[3 * i] = (members[3 * i][0], image)
        members[3 * i + 1] = (members[3 * i + 1][0], b"a word" * (1 + (7 * i + 3 * shard) % 5))
    write_tar(path, members)


def with_teacher(source: Path, output: Path, **changes: Any) -> str:
    config = config_of(str(source), output, captioners={}, **changes)
    config["teachers"].pop("blue", None)
    return reinforce_here(config)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards with equal pictures: within the first, and between both."""
    folder = tmp_path_factory.mktemp("some")
    for shard, seeds in enumerate(([*range(ROWS - 2), 0, 1], [*range(8), *range(50, 50 + ROWS - 8)])):
        write_images(folder / "source" / f"{shard}.tar", seeds, shard)
    return Path(with_teacher(folder / "source/*.tar", folder / "out", scores={"sizes": {"facts": ["words"]}}))


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    write_images(folder / "source/0.tar", [3, 52, 900, 901])
    return Path(with_teacher(folder / "source/0.tar", folder / "out"))


@pytest.fixture
def url(made: Path, tmp_path: Path) -> str:
    return str(shutil.copytree(made, tmp_path / "out"))


def means(url: str) -> np.ndarray:
    vectors = np.stack([sample.images["red"].mean(axis=0) for sample in reinforce.open(url)])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def with_better(same: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Which rows have a duplicate with a larger value, or an equal one earlier."""
    rank = np.argsort(np.lexsort((np.arange(len(values)), -values)))
    return (same & (rank[None] < rank[:, None])).any(axis=1)


@pytest.mark.parametrize("keep", [None, WORDS])
def test_of_equal_images_the_best_is_kept_or_the_first(url: str, keep: str | None) -> None:
    view = make_view(url, {"deduplicate": {"exact": True, **({"keep": keep} if keep else {})}})
    samples = list(reinforce.open(url))
    values = np.array([sample.values["scores/sizes"]["words"] if keep else 0.0 for sample in samples])
    same = np.array([[one.image == other.image for other in samples] for one in samples])
    out = with_better(same, values)
    assert [reason is not None for reason in reasons_of(url)] == out.tolist()
    assert (out.sum(), len(view)) == (10, 2 * ROWS - 10)


def test_near_duplicates_are_those_of_all_pairs_among_what_earlier_rules_keep(url: str) -> None:
    rules = [{"where": f"{WORDS} > 1"}, {"deduplicate": {**NEAR, "keep": WORDS}}, {"keep": {"top": 9, "by": WORDS}}]
    view = make_view(url, *rules)
    words = np.array([sample.values["scores/sizes"]["words"] for sample in reinforce.open(url)])
    vectors, left = means(url), np.flatnonzero(words > 1)
    out = with_better(vectors[left] @ vectors[left].T >= NEAR["threshold"], words[left])
    found = reasons_of(url)
    assert {n for n, reason in enumerate(found) if reason == "2 deduplicate"} == {*left[out].tolist()}
    assert 3 < out.sum() < len(left) - 9
    assert [line["rows"] for line in view.report] == [2 * ROWS, len(left), len(left) - out.sum()]


def test_cells_find_the_duplicates_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((6000, 32)) / np.sqrt(1 + np.arange(32))
    vectors[4000:] = vectors[:2000] + 0.25 * rng.standard_normal((2000, 32)) / np.sqrt(1 + np.arange(32))
    units = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    best, places = rng.integers(0, 3, 6000).astype(np.float32), np.arange(6000)
    wanted = with_better(units.astype(np.float32) @ units.astype(np.float32).T >= 0.95, best)
    rows, cells, homes = neighbours.assign(units, neighbours.train(units, 24, seed=0), 0.95)
    found = np.zeros(6000, bool)
    for cell in range(24):
        of = rows[cells == cell]
        out = neighbours.worse_duplicates(units[of], homes[cells == cell], best[of], places[of], 0.95)
        found[of] |= out
    assert wanted.sum() > 1000
    assert not (found & ~wanted).any()
    assert found.sum() >= 0.99 * wanted.sum()
    assert len(rows) < 3 * 6000


def test_the_same_samples_are_kept_whatever_does_the_work(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [{"deduplicate": NEAR}, {"deduplicate": {"exact": True}}, {"keep": {"top": 5, "by": WORDS}}]
    first = make_view(url, *rules)
    alone = reasons_of(url)
    monkeypatch.setattr(passes, "_CHUNK_SHARDS", 1)
    second = make_view(url, *rules, processes=2)
    assert reasons_of(url) == alone
    assert second == first


def test_a_killed_selection_continues_with_what_is_finished(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [{"deduplicate": NEAR}, {"keep": {"top": 5, "by": WORDS}}]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ViewRows, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            make_view(url, *rules, processes=1)
    with pytest.raises(UserError, match="has no view 'some'; it has: none"):
        reinforce.open(url, view="some")
    with monkeypatch.context() as patched:
        patched.setattr(selection_rules, "mean_vectors", killed)  # the vectors are not read again
        resumed = make_view(url, *rules, processes=1)
    again = reasons_of(url)
    assert make_view(url, *rules) == resumed
    assert reasons_of(url) == again
    assert not [*Path(url, "views/some").glob("parts-*")]


def test_images_of_another_dataset_are_left_out(url: str, evaluation: Path) -> None:
    rule = {"decontaminate": {"against": [str(evaluation)], "teacher": "red", "threshold": 0.95}}
    view = make_view(url, rule, {"where": f"{WORDS} > 0"})
    near = (means(url) @ means(str(evaluation)).T >= 0.95).any(axis=1)
    assert [reason == "1 decontaminate" for reason in reasons_of(url)] == near.tolist()
    assert 2 < near.sum() < 2 * ROWS
    [dataset] = view.rules[0]["decontaminate"]["against"].values()
    layer = json.loads((evaluation / "dataset.json").read_text())["layers"]["embeddings/red/images"]
    assert dataset["fingerprint"] == layer["fingerprint"]


def test_shards_are_embedded_once_by_the_config_of_the_run(url: str, evaluation: Path, tmp_path: Path) -> None:
    """They leave out what the reinforced dataset of them leaves out."""
    made = config_of("not/read/*.tar", Path(url), captioners={})
    (tmp_path / "my.yaml").write_text(json.dumps(made))
    calls = []

    def reinforce(config: Config) -> None:
        calls.append(config)
        results: list[ShardResult] = []
        reinforce_here(config.model_dump(mode="json", by_alias=True), results=results)
        computed.append(len(results))

    computed: list[int] = []
    raw = f"{evaluation.parent}/source/*.tar"
    rule = {"against": [raw], "teacher": "red", "config": str(tmp_path / "my.yaml")}
    config = parse(SelectConfig, {"dataset": url, "name": "some", "rules": [{"decontaminate": rule}]})
    first, again = (select(config, reinforce=reinforce) for _ in range(2))
    assert (first, computed) == (again, [1, 0])
    assert [*calls[0].teachers] == ["red"]
    assert [*first.rules[0]["decontaminate"]["against"]] == [raw]
    assert "config" not in first.rules[0]["decontaminate"]
    found = reasons_of(url)
    make_view(url, {"decontaminate": {"against": [str(evaluation)], "teacher": "red"}})
    assert found == reasons_of(url)
    assert found.count("1 decontaminate") > 2
    for change, message in (
        ({"teachers": {}}, "my.yaml has no model of teacher red. It has: none."),
        ({"augmentations": {"count": 1, "size": 20}}, "has other augmentations"),
    ):
        (tmp_path / "my.yaml").write_text(json.dumps({**made, **change}))
        shutil.rmtree(Path(url, "views/some/references"), ignore_errors=True)
        with pytest.raises(UserError, match=message):
            select(config, reinforce=reinforce)


def test_a_dataset_that_cannot_be_compared_is_one_error(url: str, evaluation: Path, tmp_path: Path) -> None:
    def message(against: str, teacher: str = "red") -> str:
        with pytest.raises(UserError) as raised:
            make_view(url, {"decontaminate": {"against": [against], "teacher": teacher}})
        assert not Path(url, "views").exists()
        return str(raised.value)

    fix = "with the teacher red, and the `augmentations` and the image policy of this dataset"
    for raw in (f"{evaluation.parent}/source/*.tar", str(evaluation.parent)):
        assert message(raw).startswith(f"against: {raw} is not a reinforced dataset. Run `reinforce run` on its images")
    assert "no teacher 'blue' has embedded the images of this dataset. Those that have: red." in message("x", "blue")
    shutil.copytree(evaluation, tmp_path / "other")
    path = tmp_path / "other/dataset.json"
    content = manifest_to_change(path.parent)
    for change in ({"augmentations": {**content["augmentations"], "size": 20}}, {"teachers": {}}):
        path.write_text(json.dumps({**content, **change}))
        assert fix in message(str(tmp_path / "other"))
    path.write_text(json.dumps(content))
    next((tmp_path / "other/embeddings/red/images").iterdir()).unlink()
    assert "lacks 1 of 1 shard (" in message(str(tmp_path / "other"))


@pytest.fixture
def plain(tmp_path: Path) -> str:
    """A dataset without duplicates."""
    write_images(tmp_path / "0.tar", [*range(12)])
    return with_teacher(tmp_path / "0.tar", tmp_path / "data")


def rule(*against: str, **changes: Any) -> dict[str, Any]:
    return {"decontaminate": {"against": [*against], "teacher": "red", "threshold": 0.95, **changes}}


def test_reference_images_without_vectors_are_counted_and_refused_unless_accepted(plain: str, tmp_path: Path) -> None:
    write_images(tmp_path / "evaluation.tar", [0, 1, None, 3, None, 5])
    evaluation = with_teacher(tmp_path / "evaluation.tar", tmp_path / "evaluation")
    with pytest.raises(UserError) as raised:
        make_view(plain, rule(evaluation))
    reason = "samples with the images that have no vector would be kept"
    assert str(raised.value).startswith(f"rule 1 decontaminate: {reason}: {evaluation} has 2 ")
    assert str(raised.value).endswith("accept this by `without_vectors: 2`.")
    with pytest.raises(UserError, match="without_vectors: 2"):
        make_view(plain, rule(evaluation, without_vectors=1))
    view = make_view(plain, rule(evaluation, without_vectors=2))
    [line] = view.report
    assert (line["references"], line["without_vectors"]) == (4, 2)


def test_vectors_from_labels_are_references_and_rows_without_labels_are_counted(plain: str, tmp_path: Path) -> None:
    write_images(tmp_path / "evaluation.tar", [0, 3, 7])
    evaluation = with_teacher(tmp_path / "evaluation.tar", tmp_path / "evaluation")
    make_view(plain, rule(evaluation))
    wanted = keys_of(plain)
    assert 0 < len(wanted) < 12
    labels = export_labels(evaluation, f"{tmp_path}/labels", use_ray=False).output
    taken = {"augmentations": {}, "teachers": {}, "labels": {"lab": {"url": labels, "layers": ["embeddings/red"]}}}
    taking = with_teacher(tmp_path / "evaluation.tar", tmp_path / "taking", **taken)
    for reference in (labels, taking):
        make_view(plain, rule(reference))
        assert keys_of(plain) == wanted
    write_images(tmp_path / "sources/evaluation.tar", [0, 3, 7])
    write_images(tmp_path / "sources/more.tar", [40, 41], shard=9)
    more = with_teacher(tmp_path / "sources/*.tar", tmp_path / "more", **taken)
    with pytest.raises(UserError, match=r"more has 2 null in embeddings/red/images. `reinforce status` shows why"):
        make_view(plain, rule(more))
    make_view(plain, rule(more, without_vectors=2))
    assert keys_of(plain) == wanted
    with pytest.raises(UserError, match="rule 1 decontaminate leaves out the last"):  # with equal vectors
        make_view(taking, rule(evaluation, threshold=1.0))


@pytest.mark.parametrize(("count", "dim"), [(500, 32), (500, 768), (neighbours._SEARCH_ALL + 1, 32)])
def test_a_threshold_of_1_finds_equal_vectors_in_float16_and_no_others(tmp_path: Path, count: int, dim: int) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((count, dim))
    units = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    parts = Parts(str(tmp_path), "some", "0")
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


def test_equal_keys_of_two_shards_are_drawn_independently() -> None:
    keys = np.array([f"{number:08d}" for number in range(1000)], object)
    one, again, other, seed = (
        selection_rules.draw(number, shard, keys) for number, shard in ((0, "a"), (0, "a"), (0, "b"), (1, "a"))
    )
    assert np.array_equal(one, again)
    assert (one != other).all()
    assert (one != seed).all()
