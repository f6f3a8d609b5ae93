"""Duplicates within a dataset and of other datasets: found as by comparing all pairs, whatever does the work."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import reinforce
from reinforce.config import Config
from reinforce.dataset.view import ViewRows
from reinforce.engine.messages.results import ShardResult
from reinforce.errors import UserError
from reinforce.selection import neighbours, passes
from reinforce.selection import rules as selection_rules
from reinforce.selection.config import SelectConfig
from reinforce.selection.select import select
from reinforce.settings import parse
from tests.helpers.data import config_of, members_of, picture, write_tar
from tests.helpers.reinforced import reinforce_here
from tests.helpers.views import make_view

ROWS = 16
NEAR = {"teacher": "red", "threshold": 0.97}
WORDS = "scores.sizes.words"


def make(folder: Path, pictures: list[list[int]], **changes: Any) -> str:
    """A dataset of shards with these pictures, by seed."""
    for shard, seeds in enumerate(pictures):
        members = members_of(shard, len(seeds))
        for i, seed in enumerate(seeds):
            members[3 * i] = (members[3 * i][0], picture(seed))
            members[3 * i + 1] = (members[3 * i + 1][0], b"a word" * (1 + (7 * i + 3 * shard) % 5))
        write_tar(folder / "source" / f"{shard}.tar", members)
    config = config_of(f"{folder}/source/*.tar", folder / "out", captioners={}, **changes)
    del config["teachers"]["blue"]
    return reinforce_here(config)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards with equal pictures: within the first, and between both."""
    seeds = [*range(ROWS - 2), 0, 1], [*range(8), *range(50, 50 + ROWS - 8)]
    return Path(make(tmp_path_factory.mktemp("some"), [*seeds], scores={"sizes": {"facts": ["words"]}}))


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make(tmp_path_factory.mktemp("evaluation"), [[3, 52, 900, 901]]))


@pytest.fixture
def url(made: Path, tmp_path: Path) -> str:
    shutil.copytree(made, tmp_path / "out")
    return str(tmp_path / "out")


view_of = functools.partial(make_view, name="mine")


def reasons(url: str) -> list[str | None]:
    [folder] = [folder for folder in Path(url, "views/mine").glob("rows-*") if any(folder.iterdir())]
    return [row for path in sorted(folder.iterdir()) for row in pq.read_table(path)["left_out"].to_pylist()]


def means(url: str) -> np.ndarray:
    vectors = np.stack([sample.images["red"].mean(axis=0) for sample in reinforce.open(url)])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def with_better(same: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Which rows have a duplicate with a larger value, or an equal one earlier."""
    rank = np.argsort(np.lexsort((np.arange(len(values)), -values)))
    return (same & (rank[None] < rank[:, None])).any(axis=1)


@pytest.mark.parametrize("keep", [None, WORDS])
def test_of_equal_images_the_best_is_kept_or_the_first(url: str, keep: str | None) -> None:
    view = view_of(url, {"deduplicate": {"exact": True, **({"keep": keep} if keep else {})}})
    samples = list(reinforce.open(url))
    values = np.array([sample.values["scores/sizes"]["words"] if keep else 0.0 for sample in samples])
    same = np.array([[one.image == other.image for other in samples] for one in samples])
    out = with_better(same, values)
    assert [reason is not None for reason in reasons(url)] == out.tolist()
    assert (out.sum(), len(view)) == (10, 2 * ROWS - 10)


def test_near_duplicates_are_those_of_all_pairs_among_what_earlier_rules_keep(url: str) -> None:
    rules = [{"where": f"{WORDS} > 1"}, {"deduplicate": {**NEAR, "keep": WORDS}}, {"keep": {"top": 9, "by": WORDS}}]
    view = view_of(url, *rules)
    words = np.array([sample.values["scores/sizes"]["words"] for sample in reinforce.open(url)])
    vectors, left = means(url), np.flatnonzero(words > 1)
    out = with_better(vectors[left] @ vectors[left].T >= NEAR["threshold"], words[left])
    found = reasons(url)
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
    first = view_of(url, *rules)
    alone = reasons(url)
    monkeypatch.setattr(passes, "_CHUNK_SHARDS", 1)
    second = view_of(url, *rules, processes=2)
    assert reasons(url) == alone
    assert second == first


def test_a_killed_selection_continues_with_what_is_finished(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [{"deduplicate": NEAR}, {"keep": {"top": 5, "by": WORDS}}]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ViewRows, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            view_of(url, *rules, processes=1)
    with pytest.raises(UserError, match="has no view 'mine'; it has: none"):
        reinforce.open(url, view="mine")
    with monkeypatch.context() as patched:
        patched.setattr(selection_rules, "mean_vectors", killed)  # the vectors are not read again
        resumed = view_of(url, *rules, processes=1)
    again = reasons(url)
    assert view_of(url, *rules) == resumed
    assert reasons(url) == again
    assert not [*Path(url, "views/mine").glob("parts-*")]


def test_images_of_another_dataset_are_left_out(url: str, evaluation: Path) -> None:
    rule = {"decontaminate": {"against": [str(evaluation)], "teacher": "red", "threshold": 0.95}}
    view = view_of(url, rule, {"where": f"{WORDS} > 0"})
    near = (means(url) @ means(str(evaluation)).T >= 0.95).any(axis=1)
    assert [reason == "1 decontaminate" for reason in reasons(url)] == near.tolist()
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
    config = parse(SelectConfig, {"dataset": url, "name": "mine", "rules": [{"decontaminate": rule}]})
    first, again = (select(config, reinforce=reinforce) for _ in range(2))
    assert (first, computed) == (again, [1, 0])
    assert [*calls[0].teachers] == ["red"]
    assert [*first.rules[0]["decontaminate"]["against"]] == [raw]
    assert "config" not in first.rules[0]["decontaminate"]
    found = reasons(url)
    view_of(url, {"decontaminate": {"against": [str(evaluation)], "teacher": "red"}})
    assert found == reasons(url)
    assert found.count("1 decontaminate") > 2
    for change, message in (
        ({"teachers": {}}, "my.yaml has no model of teacher red. It has: none."),
        ({"augmentations": {"count": 1, "size": 20}}, "has other augmentations"),
    ):
        (tmp_path / "my.yaml").write_text(json.dumps({**made, **change}))
        shutil.rmtree(Path(url, "views/mine/references"), ignore_errors=True)
        with pytest.raises(UserError, match=message):
            select(config, reinforce=reinforce)


def test_a_dataset_that_cannot_be_compared_is_one_error(url: str, evaluation: Path, tmp_path: Path) -> None:
    def message(against: str, teacher: str = "red") -> str:
        with pytest.raises(UserError) as raised:
            view_of(url, {"decontaminate": {"against": [against], "teacher": teacher}})
        assert not Path(url, "views").exists()
        return str(raised.value)

    fix = "with the teacher red, and the `augmentations` and the image policy of this dataset"
    for raw in (f"{evaluation.parent}/source/*.tar", str(evaluation.parent)):
        assert message(raw).startswith(f"against: {raw} is not a reinforced dataset. Run `reinforce run` on its images")
    assert "no teacher 'blue' has embedded the images of this dataset. Those that have: red." in message("x", "blue")
    shutil.copytree(evaluation, tmp_path / "other")
    path = tmp_path / "other/dataset.json"
    content = json.loads(path.read_text())
    for change in ({"augmentations": {**content["augmentations"], "size": 20}}, {"teachers": {}}):
        path.write_text(json.dumps({**content, **change}))
        assert fix in message(str(tmp_path / "other"))
    path.write_text(json.dumps(content))
    next((tmp_path / "other/embeddings/red/images").iterdir()).unlink()
    assert "lacks 1 of 1 shard (" in message(str(tmp_path / "other"))
