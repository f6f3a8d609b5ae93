"""The best evaluated state of a training: kept, exported, and of which sets it is the best."""

from __future__ import annotations

import json
import math
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reinforce.errors import UserError
from reinforce.storage import Storage
from reinforce.training.checkpoints import BestCheckpoint, CheckpointFolder
from reinforce.training.config import Job
from reinforce.training.results import Results, read_results
from reinforce.training.task import Metrics
from tests.helpers.trainings import TowersTask, job, rows, run

pytestmark = pytest.mark.usefixtures("no_pictures")


class Scored(TowersTask):
    """Evaluations give these scores, in order."""

    def __init__(self, *scores: float) -> None:
        super().__init__()
        self.scores = iter(scores)

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        return {"other": 0.0, "top1": next(self.scores)}


class Partial(Scored):
    """The metric is of a part of its set."""

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        return pickle.loads(pickle.dumps(Metrics(super().evaluate(model), {"top1": "151 of 301 images"})))


def scored(made: Job, *scores: float, task: type[Scored] = Scored) -> Results:
    torch.manual_seed(0)
    return run(made, task=task(*scores))[0]


def test_the_best_checkpoint_is_kept_in_addition_to_the_latest(tmp_path: Path) -> None:
    """A metric that is not finite is reported, and never the best."""

    made = job(tmp_path, evaluate_every=3, best="top1", checkpoints={"every": 100, "keep": 1})
    results = scored(made, math.nan, 0.9, 0.4, math.nan)
    assert CheckpointFolder(Storage(made.output), 1).steps() == [6, 9, 12]
    assert results.best == BestCheckpoint(6, "top1", 0.9)
    assert "best top1: 90.00 at step 6" in results.summary()
    assert re.search("top1 +not finite", results.summary())


def exported(output: Path) -> torch.Tensor:
    return torch.tensor(json.loads((output / "student/weights/right.json").read_text()))


def test_the_best_evaluated_state_is_exported_with_its_step_and_metrics(tmp_path: Path) -> None:
    last = job(tmp_path, evaluate_every=4, best="top1", ema=0.9, checkpoints={"every": 100, "keep": 1})
    wanted = replace(last, export_best=True)
    results = scored(wanted, 0.2, 0.9, 0.4)
    assert (results.exported, results.steps, results.metrics["top1"]) == (8, 12, 0.9)
    assert "best top1: 90.00 at step 8, exported" in results.summary()
    best = load_file(tmp_path / "checkpoints/step-000000008.safetensors")["average/right.weight"]
    assert torch.equal(exported(tmp_path), best)
    results = scored(last)
    assert (results.exported, results.metrics["top1"]) == (12, 0.4), "a finished training exports again where asked"
    assert not torch.equal(exported(tmp_path), best)
    assert scored(wanted).exported == 8
    assert torch.equal(exported(tmp_path), best)
    assert scored(wanted) == read_results(Storage(str(tmp_path)))
    with pytest.raises(UserError, match=r"has no checkpoint of a step that is known to be the best by other"):
        scored(replace(wanted, best="other"))


def test_a_metric_of_a_part_of_a_set_is_named_so_and_chooses_the_best_checkpoint_only_if_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    default = job(tmp_path / "default", evaluate_every=6, best="top1")
    results = scored(default, 0.9, 0.4, task=Partial)
    assert results.best is None
    assert results.parts == {"top1": "151 of 301 images"}
    assert "top1 of 151 of 301 images    40.00" in results.summary()
    assert read_results(Storage(default.output)) == results
    assert [row["parts"] for row in rows(tmp_path / "default") if "metrics" in row] == [results.parts] * 2
    events = EventAccumulator(f"{default.output}/tensorboard").Reload()
    assert [event.value for event in events.Scalars("metrics/top1 of 151 of 301 images")] == pytest.approx([0.9, 0.4])
    out = capsys.readouterr().out
    assert out.count("no best checkpoint is kept, since top1 is of 151 of 301 images; set evaluate.best to choose") == 1
    assert "step 6, %: other 0.00  top1 of 151 of 301 images 90.00" in out
    asked = replace(job(tmp_path / "asked", evaluate_every=6, best="top1"), best_of_part=True, export_best=True)
    results = scored(asked, 0.9, 0.4, task=Partial)
    assert (results.exported, results.best) == (6, BestCheckpoint(6, "top1", 0.9))
    assert "best top1 of 151 of 301 images: 90.00 at step 6, exported" in results.summary()
    with pytest.raises(UserError, match=r"top1 is of 151 of 301 images. Set evaluate.best"):
        scored(replace(asked, output=str(tmp_path / "not"), best_of_part=False), 0.9, 0.4, task=Partial)


def test_the_state_before_the_first_step_may_be_the_best_one(tmp_path: Path) -> None:
    made = replace(job(tmp_path, best="top1", checkpoints={"every": 4, "keep": 1}), evaluate_start=True)
    assert scored(made, 0.9, 0.4).best == BestCheckpoint(12, "top1", 0.4), "which has no checkpoint unless it is wanted"
    assert scored(replace(made, export_best=True, output=str(tmp_path / "best")), 0.9, 0.4).exported == 0
    torch.manual_seed(0)
    assert torch.equal(exported(tmp_path / "best"), TowersTask().model.right.weight)


def test_an_evaluation_before_the_first_step_is_repeated_where_no_checkpoint_was_written(tmp_path: Path) -> None:
    """The config, and so the model that was evaluated, may have changed since then."""
    made, killed = replace(job(tmp_path, steps=3), evaluate_start=True), Scored(0.1)
    killed.losses = lambda *_: pytest.fail("killed")  # type: ignore[assignment, method-assign]
    with pytest.raises(pytest.fail.Exception):
        run(made, task=killed)
    assert [row["metrics"]["top1"] for row in rows(tmp_path)] == [0.1]
    scored(made, 0.2, 0.3)
    found = [(row["step"], row["metrics"]["top1"]) for row in rows(tmp_path) if "metrics" in row]
    assert found == [(0, 0.2), (3, 0.3)]
