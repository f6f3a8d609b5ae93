"""Curves, plateaus and tables of a tuning, and its screening, compared with trained students and its definitions."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.table import Table

from reinforce.dataset import vectors
from reinforce.student.config import StudentConfig
from reinforce.tuning.config import LAMBDA, Setting, Trial
from reinforce.tuning.results import (
    TrialOutcome,
    check_screening,
    make_curves,
    make_rows,
    results_table,
    screening_lines,
    screening_table,
    spearman,
    subsets_lines,
    subsets_table,
)
from reinforce.tuning.screening import (
    Cosines,
    ScaleMeasures,
    SubsetMeasures,
    SubsetScreening,
    TeacherScreening,
    _most_likely_scale,
    _read_batches,
    measure_subsets,
    screen,
)
from tests.helpers.reinforced import small_dataset
from tests.helpers.tuning import scale_curve, scale_outcomes, toy_screening, trial_student


def test_plateau_is_within_one_standard_error_of_the_best() -> None:
    spread = 0.02  # of two seeds: deviation 0.02 x sqrt 2, standard error 0.02
    means = {10.0: 0.50, 20.0: 0.59, 40.0: 0.60, 60.0: 0.585, 90.0: 0.55, 120.0: 0.595}
    curve = scale_curve({scale: [mean - spread, mean + spread] for scale, mean in means.items()})
    assert curve.best == 40.0
    assert curve.plateau is not None
    assert (curve.plateau.low, curve.plateau.high) == (20.0, 60.0)  # 120 is as good, and not next to it
    assert curve.plateau.width == pytest.approx(0.02)
    assert curve.plateau.unknown == []
    assert curve.describe() == "red: best at 40 (0.6000), plateau 20 to 60 (within 0.0200, one standard error)"


def test_plateau_is_unknown_of_one_seed_and_on_the_side_where_trials_were_stopped() -> None:
    curve = scale_curve({10.0: None, 20.0: [0.58, 0.62], 40.0: [0.59, 0.63], 80.0: [0.1, 0.14]})
    assert curve.plateau is not None
    assert (curve.plateau.low, curve.plateau.high, curve.plateau.unknown) == (20.0, 40.0, ["below"])
    assert "the value below it was not trained to the end" in curve.describe()
    assert [row.setting.scales["red"] for row in curve.neighbours] == [10.0, 80.0]
    assert "plateau unknown" in scale_curve({10.0: [0.2], 20.0: [0.3]}, seeds=1).describe()
    curve = scale_curve({10.0: [0.2, 0.2], 20.0: [0.9]})
    assert curve.best == 10.0
    assert [row.mean for _, row in curve.rows] == [0.2, None], "a missing seed has no mean"


def test_a_best_value_at_an_end_of_those_tried_is_stated_with_the_side_to_try() -> None:
    middle = scale_curve({10.0: [0.2, 0.2], 20.0: [0.3, 0.3], 40.0: [0.1, 0.1]})
    lowest, highest = (scale_curve({10.0: [one], 20.0: [1 - one], 40.0: None}, seeds=1) for one in (0.9, 0.1))
    assert (middle.edge, highest.edge) == (None, None), "a stopped trial above it was tried"
    assert lowest.edge == "the best value is the lowest that was tried, 10: try lower ones, too"
    assert "the highest that was tried, 20: try higher" in str(scale_curve({10.0: [0.1], 20.0: [0.3]}, seeds=1).edge)
    at_one = replace(lowest, axis=LAMBDA, rows=[(0.5, lowest.rows[1][1]), (1.0, lowest.rows[0][1])], best=1.0)
    assert at_one.edge is None, "there is no lambda above 1"
    assert "try lower" in str(replace(at_one, best=0.5).edge)


def test_joint_curve_takes_the_best_setting_at_each_value_and_none_with_a_failed_trial() -> None:
    outcomes = {}
    for red, blue, value in ((10.0, 1.0, 0.3), (10.0, 2.0, 0.5), (20.0, 1.0, 0.6), (20.0, 2.0, 0.2)):
        outcomes[Trial(Setting("joint", {"red": red, "blue": blue}), 0)] = TrialOutcome("finished", [(10, value)])
    of_red, of_blue = make_curves(make_rows(outcomes, [0]))
    assert [(value, row.mean) for value, row in of_red.rows] == [(10.0, 0.5), (20.0, 0.6)]
    assert [(value, row.mean) for value, row in of_blue.rows] == [(1.0, 0.6), (2.0, 0.5)]
    outcomes = scale_outcomes({10.0: [0.2, 0.2], 20.0: [0.9]})
    outcomes[Trial(Setting("red", {"red": 20.0}, alone=True), 1)] = TrialOutcome("open", [(5, 0.9)], error="no memory")
    rows = make_rows(outcomes, [0, 1])
    assert [(row.state, row.mean) for row in rows] == [("finished", 0.2), ("failed", None)]
    assert rows[1].json()["fault"] == "no memory"
    (curve,) = make_curves(rows)
    assert curve.best == 10.0


def test_row_is_stored_under_the_keys_of_table_json() -> None:
    (finished, stopped) = make_rows(scale_outcomes({10.0: [0.2, 0.4], 20.0: None}), [0, 1])
    assert finished.json() == {
        "curve": "red", "red": 10.0, "state": "finished", "mean": pytest.approx(0.3),
        "deviation": pytest.approx(0.02**0.5), "values": {"0": 0.2, "1": 0.4}, "reached": 10, "last": 0.2,
    }  # fmt: skip
    assert {key: stopped.json()[key] for key in ("state", "mean", "values", "reached", "last")} == {
        "state": "stopped", "mean": None, "values": {}, "reached": 5, "last": 0.1,
    }  # fmt: skip


def cells(table: Table) -> list[tuple[str, ...]]:
    """The rows of a table."""
    return list(zip(*(map(str, column.cells) for column in table.columns), strict=True))


def test_tables_show_the_best_a_stopped_and_a_failed_setting_and_the_scale_nearest_to_the_most_likely_one() -> None:
    outcomes = scale_outcomes({10.0: [0.2, 0.2], 20.0: [0.3, 0.3], 40.0: None})
    outcomes[Trial(Setting("red", {"red": 80.0}, alone=True), 0)] = TrialOutcome("open", error="no memory")
    assert cells(results_table(make_rows(outcomes, [0, 1]), "accuracy")) == [
        ("red", "red 10", "0.2000", "0.0000", "2", ""),
        ("red", "red 20", "0.3000", "0.0000", "2", "best"),
        ("red", "red 40", "(0.1000)", "", "", "stopped at step 5"),
        ("red", "red 80", "", "", "0", "failed: no memory"),
    ]
    assert cells(screening_table({"red": toy_screening(10.0, 40.0)})) == [
        ("red", "10", "0.100", "0.100", "20.000", "-", ""),
        ("red", "40", "0.025", "0.400", "10.000", "-", "most likely: 30"),
    ]


def test_screening_is_compared_at_the_end_of_training_or_at_the_last_shared_step() -> None:
    curve = scale_curve({10.0: [0.1, 0.1], 20.0: [0.3, 0.3], 40.0: [0.4, 0.4]})
    check = check_screening(curve, toy_screening(10.0, 20.0, 40.0), [])
    assert check.ranks["entropy"] == pytest.approx(-1)
    assert check.ranks["true_pair"] == pytest.approx(1)
    assert check.ranks["agreement"] is None
    assert (check.step, check.count, check.nearest) == (None, 3, 40.0)
    assert check.lost == pytest.approx(0)
    assert list(vars(check)) == ["ranks", "count", "step", "calibrated", "best", "nearest", "lost"]
    curve = scale_curve({10.0: None, 20.0: [0.3, 0.3], 40.0: [0.2, 0.2]})
    check = check_screening(curve, toy_screening(10.0, 20.0, 40.0), [{5: 0.1}, {5: 0.2, 10: 0.3}, {5: 0.3, 10: 0.2}])
    assert (check.step, check.ranks["true_pair"]) == (5, pytest.approx(1))
    assert "at step 5, which all trials reached" in check.describe("red")
    # Worked example with a tie: ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4.
    assert spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert spearman([1, 1, 1], [1, 2, 3]) is None


SIZE, COUNT = 12, 3
SCALES = {"red": [0.01, 5.0, 40.0], "blue": [20.0, 60.0]}


@pytest.fixture(scope="module")
def config(labelled: str) -> StudentConfig:
    return trial_student("student", 1, {"datasets": labelled, "window": 16}, batch=SIZE)


@pytest.fixture(scope="module")
def screenings(config: StudentConfig) -> dict[str, TeacherScreening]:
    return screen(config, SCALES, {"red": 50.0, "blue": 30.0}, COUNT, None)[0]


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def test_measures_match_their_definitions(config: StudentConfig, screenings: dict[str, TeacherScreening]) -> None:
    entropies, true, losses, agreements = [], [], [], []
    for batch in _read_batches(config, ["red", "blue"], COUNT, SIZE):
        for kind in ("caption", "synthetic"):
            for turn in (lambda m: m, lambda m: m.T):
                one = softmax(turn(5.0 * batch["red"][kind].numpy().astype(np.float64)))
                other = softmax(turn(30.0 * batch["blue"][kind].numpy().astype(np.float64)))
                entropies.append(-(one * np.log(one)).sum(axis=1).mean() / np.log(SIZE))
                true.append(np.diag(one).mean())
                losses.append(-np.log(np.diag(one)).mean())
                middle = (one + other) / 2
                divergence = [(p * np.log(p / middle)).sum(axis=1).mean() for p in (one, other)]
                agreements.append(1 - np.mean(divergence) / np.log(2))
    measured = screenings["red"].scales[1]
    assert measured.scale == 5.0
    expected = [np.mean(values) for values in (entropies, true, losses, agreements)]
    assert [measured.entropy, measured.true_pair, measured.calibration, measured.agreement] == pytest.approx(
        expected, rel=1e-4
    )
    assert np.mean([measured.entropy_of_images, measured.entropy_of_texts]) == pytest.approx(measured.entropy)


def test_most_likely_scale_has_the_lowest_loss_on_a_grid(config: StudentConfig) -> None:
    grid = [float(scale) for scale in np.geomspace(1, 30, 60)]
    screening = screen(config, {"blue": grid}, {"blue": 30.0}, COUNT, None)[0]["blue"]
    losses = screening.curve("calibration")
    best = grid[int(np.argmin(losses))]  # type: ignore[arg-type]
    assert screening.calibrated == pytest.approx(best, rel=0.06)
    assert screening.curve("agreement") == [None] * 60  # undefined for a single teacher


@pytest.mark.parametrize(("sign", "bound", "fix"), [(-1, 1.0, "captions belong"), (1, 1000.0, "Raise screening.batch")])
def test_a_search_for_the_most_likely_scale_that_ends_at_a_bound_is_no_result(
    sign: int, bound: float, fix: str
) -> None:
    cosines = torch.full((8, 8), 0.5) + sign * 0.001 * torch.eye(8)
    assert _most_likely_scale([cosines]) == bound, "the number of the line and of the table"
    screening = TeacherScreening([ScaleMeasures(50.0, 0, 0, 0, 0, 0)], _most_likely_scale([cosines]), 0.0)
    assert fix in str(screening.json()["fault"])
    (line,) = screening_lines({"red": screening, "blue": replace(screening, calibrated=30.0)})
    assert line.startswith("screening of red: the search for the most likely scale ended at its")
    notes = [*screening_table({"red": screening}).columns[-1].cells]
    assert notes == [f"not found, search ended at: {screening.calibrated:g}"]


def test_screening_is_deterministic_and_depends_on_the_seed(
    config: StudentConfig, screenings: dict[str, TeacherScreening]
) -> None:
    for seed in (config.seed, config.seed + 1):
        seeded = config.model_copy(update={"seed": seed})
        again, _ = screen(seeded, SCALES, {"red": 50.0, "blue": 30.0}, COUNT, None)
        assert (again == screenings) == (seed == config.seed)


def brute_force(
    cosines: Sequence[Mapping[str, Mapping[str, np.ndarray]]], scales: Mapping[str, float]
) -> dict[tuple[str, ...], list[float]]:
    """Likelihood, entropy, agreement, accuracy and what is known alone by subset, row by row in float64."""
    found = {}
    for size in range(1, len(scales) + 1):
        for subset in itertools.combinations(scales, size):
            rows = []
            for batch, kind in itertools.product(cosines, next(iter(cosines[0].values()))):
                for turned in (False, True):
                    logits = {name: scale * batch[name][kind].astype(np.float64) for name, scale in scales.items()}
                    each = {name: softmax(values.T if turned else values) for name, values in logits.items()}
                    mean = np.mean([each[name] for name in subset], axis=0)
                    for row, predicted in enumerate(mean):
                        likely = {name: int(np.argmax(of_teacher[row])) for name, of_teacher in each.items()}
                        right = [name for name, one in likely.items() if one == row]
                        rows.append([
                            np.log(predicted[row]),
                            -sum(p * np.log(p) for p in predicted),
                            len({likely[name] for name in subset}) == 1,
                            np.argmax(predicted) == row,
                            right == [*subset],
                        ])  # fmt: skip
            found[subset] = np.mean(rows, axis=0).tolist()
    return found


def check_subsets(measured: Sequence[SubsetMeasures], expected: dict[tuple[str, ...], list[float]]) -> None:
    assert [*measured] == sorted(measured, key=lambda one: -one.likelihood)
    assert {tuple(one.teachers) for one in measured} == expected.keys()
    for one in measured:
        likelihood, entropy, agreement, accuracy, alone = expected[tuple(one.teachers)]
        single = len(one.teachers) == 1
        assert (one.agreement is None, one.alone is None) == (single, not single)
        numbers = [one.likelihood, one.entropy, one.accuracy, one.alone if single else one.agreement]
        assert numbers == pytest.approx([likelihood, entropy, accuracy, alone if single else agreement], rel=1e-4)


def toy_cosines(noises: Mapping[str, float], kinds: Sequence[str] = ("caption",), size: int = 7) -> list[Cosines]:
    """Two batches of cosines of which true pairs have more, by teacher with the noise of each."""
    generator = torch.Generator().manual_seed(3)
    return [
        {
            name: {kind: 0.2 * torch.eye(size) + noise * torch.randn(size, size, generator=generator) for kind in kinds}
            for name, noise in noises.items()
        }
        for _ in range(2)
    ]


def test_subsets_of_three_teachers_match_their_definitions() -> None:
    cosines = toy_cosines({"good": 0.1, "other": 0.12, "poor": 0.3}, ("caption", "synthetic"))
    scales = {"good": 12.0, "other": 9.0, "poor": 3.0}
    plain = [{name: {k: v.numpy() for k, v in of.items()} for name, of in batch.items()} for batch in cosines]
    expected = brute_force(plain, scales)
    assert all(0 < expected[name,][4] < expected[name,][3] < 1 for name in scales), "each knows something alone"
    measured = measure_subsets(cosines, scales)
    check_subsets(measured, expected)
    assert len({one.likelihood for one in measured}) == 7


def test_a_true_pair_that_sharp_teachers_rule_out_has_a_finite_likelihood() -> None:
    cosines = [{name: {"caption": torch.tensor([[-1.0, 1.0], [1.0, -1.0]])} for name in ("red", "blue")}]
    measured = measure_subsets(cosines, {"red": 500.0, "blue": 400.0})
    assert [one.teachers for one in measured] == [["blue"], ["red", "blue"], ["red"]]
    assert [one.likelihood for one in measured] == pytest.approx([-800, -800 - np.log(2), -1000])


def test_a_copy_of_a_teacher_is_not_named_beside_it_and_one_teacher_has_no_subsets() -> None:
    for size in range(4, 24):  # the likelihood of both together differs by rounding, to either side
        toys = toy_cosines({"red": 0.1, "blue": 0.9}, size=size)
        cosines: list[Cosines] = [{**batch, "copy": batch["red"]} for batch in toys]
        measured = measure_subsets(cosines, {"red": 11.0, "copy": 11.0, "blue": 1.0})
        assert [one.teachers for one in measured[:3]] == [["red"], ["copy"], ["red", "copy"]]
        assert [measured[0].alone, measured[2].agreement] == [0, 1]
    assert measure_subsets(cosines, {"red": 11.0}) == []


def test_of_many_teachers_each_alone_all_but_one_and_all_are_measured() -> None:
    names = "abcdef"
    measured = measure_subsets(toy_cosines(dict.fromkeys(names, 0.2)), dict.fromkeys(names, 5.0))
    assert sorted(len(one.teachers) for one in measured) == [1] * 6 + [5] * 6 + [6]
    five = measure_subsets(toy_cosines(dict.fromkeys(names[:5], 0.2)), dict.fromkeys(names[:5], 5.0))
    assert len({tuple(one.teachers) for one in five}) == 31


def test_rows_that_a_teacher_has_no_vectors_of_count_for_no_subset(tmp_path: Path) -> None:
    teacher = {"class": "tests.helpers.models.partial:Partial"}
    url = small_dataset(
        tmp_path, (21, 9), captioners={}, augmentations={"count": 1, "size": 24},
        teachers={
            "whole": {"class": "tests.helpers.models:ColorTeacher"},
            "some": {**teacher, "options": {"nulls": "nan", "seed": 1}},
            "more": {**teacher, "options": {"seed": 2}},
        },
    )  # fmt: skip
    stored = {}
    for name, side in itertools.product(("whole", "some", "more"), ("images", "caption")):
        files = sorted(Path(url, "embeddings", name, side).glob("*.parquet"))
        stored[name, side] = np.concatenate([vectors.decode(pq.read_table(file))[:, 0] for file in files])
    usable = np.isfinite(np.stack([of.sum(axis=1) for of in stored.values()])).all(axis=0)
    assert 5 < usable.sum() < len(usable) - 5
    config = trial_student("student", 1, {"datasets": url}, batch=int(usable.sum()))
    _, subsets = screen(config, {}, dict.fromkeys(("whole", "some", "more"), 30.0), 1, None)
    unit = {key: vectors.normalized(of[usable]) for key, of in stored.items()}
    cosines = {name: {"caption": unit[name, "images"] @ unit[name, "caption"].T} for name in subsets.scales}
    check_subsets(subsets.subsets, brute_force([cosines], subsets.scales))


def test_table_and_lines_of_subsets_name_the_best_with_its_keys_and_who_is_left_out() -> None:
    rows = [
        SubsetMeasures(["red", "no"], -1.25, 2.0, 0.5, 0.75, None),
        SubsetMeasures(["red"], -1.5, 1.0, None, 0.5, 0.125),
    ]
    subsets = SubsetScreening(rows, {"red": 8.5, "no": 4.0}, {"eye": "has embeddings of images only"})
    assert cells(subsets_table(subsets)) == [
        ("red, no", "-1.250", "2.000", "50.0%", "75.0%", ""),
        ("red", "-1.500", "1.000", "-", "50.0%", "12.5%"),
    ]
    assert subsets_lines(subsets) == [
        "subsets of the teachers: eye is left out, it has embeddings of images only",
        "best subset of the teachers, expected log-likelihood -1.250: set data.teachers: [red, 'no'], "
        "loss.logit_scales: {red: 8.5, 'no': 4.0}",
    ]
    assert subsets_lines(SubsetScreening((), {"red": 8.5}, {})) == []
