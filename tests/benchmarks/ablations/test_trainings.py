"""Progress of the ablations' trainings."""

from __future__ import annotations

from benchmarks.ablations.arms import Study
from benchmarks.ablations.results import find_training
from benchmarks.ablations.trainings import _Progress
from tests.helpers.ablations import write_dataset


def test_progress_counts_finished_trainings_and_logged_steps(study: Study) -> None:
    write_dataset(study)
    found = [find_training(study, arm, 0) for arm in (study.plain, study.distilled)]
    first, second = (training for training in found if training is not None)
    progress = _Progress([first, second], done=3)
    assert (progress.total, progress.steps) == (2 * study.steps, 0)
    second.folder.mkdir(parents=True)
    (second.folder / "log.jsonl").write_text('{"step": 80, "loss": 1.0}\n{"step": 90, "lo')
    progress.finish(first)
    line = progress.line([second])
    assert line.startswith(f"4 of 5 trainings  distilled-0 at 80 of {study.steps}  about ")
    assert progress.steps == study.steps + 80
