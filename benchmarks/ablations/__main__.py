"""python -m benchmarks.ablations: run the ablations of ``make ablations``."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ablations import page
from benchmarks.ablations.arms import Study
from benchmarks.ablations.encoders import prepare
from benchmarks.ablations.questions import Question, make_questions
from benchmarks.ablations.results import find_training, read_answer
from reinforce.errors import UserError
from reinforce.processes.signals import Stopped
from reinforce.terminal import Screen

OUT = Path("demo/ablations")


def main(out: Path, names: Sequence[str], seeds: int, overrides: Sequence[str], address: str | None) -> None:
    """Answer the questions; finished trainings are kept. Raises UserError, and Stopped after a signal."""
    from benchmarks.ablations.trainings import make_datasets, train_all
    from reinforce.processes.cluster import ray_cluster

    study, screen = Study(out, overrides), Screen()
    questions = make_questions(study)
    if unknown := [name for name in names if name not in questions]:
        raise UserError(f"unknown question {', '.join(unknown)}; available: {', '.join(questions)}.")
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: must be 1 or more; 3 or more to estimate the spread.")
    chosen = [question for name in names or questions if can_answer(question := questions[name], names, screen)]
    arms = {arm.name: arm for question in chosen for arm in question.arms}
    written: list[str] = []
    stored = page.read_stored_answers(study, seeds)

    def write() -> None:
        """Write the page if another question is answered; stored answers with the same arms are kept."""
        new = {
            name: answer
            for name, question in questions.items()
            if (answer := read_answer(study, question, seeds)) is not None
        }
        if [*new] != written:
            written[:] = new
            answers = [{**stored, **new}[name] for name in questions if name in stored or name in new]
            answered = [answer.question.name for answer in answers]
            page.write_page(study, answers, page.describe_study(study, seeds, answered, None if out == OUT else out))
            screen.log(f"{page.PAGE} and {page.RESULTS} have: {', '.join(answered)}")

    if encoders := [arm.encoder for arm in arms.values() if arm.encoder is not None]:
        prepare(encoders, out)
    with contextlib.ExitStack() as stack:
        started: list[bool] = []

        def start_cluster() -> None:  # once, and only if something is left to do
            if not started:
                started.append(True)
                # Seconds per step are reported, so workers run with normal priority.
                os.environ.setdefault("RAY_worker_niceness", "0")
                stack.enter_context(ray_cluster(address, log_to_driver=False))

        make_datasets(study, dict.fromkeys(arm.dataset for arm in arms.values()), start_cluster, screen)
        found = [find_training(study, arm, seed) for arm in arms.values() for seed in range(seeds)]
        trainings = [training for training in found if training is not None]
        unfinished = [training for training in trainings if training.results() is None]
        done = len(trainings) - len(unfinished)
        screen.log(f"{len(arms)} arms, {len(trainings)} trainings, {done} of them done")
        write()
        if unfinished:
            start_cluster()
            train_all(unfinished, done, write, screen)


def can_answer(question: Question, names: Sequence[str], screen: Screen) -> bool:
    """Whether the folder that a question needs exists. Raises UserError if it does not and the question is named."""
    if question.needs is None:
        return True
    folder, target = question.needs
    if folder.exists():
        return True
    problem = f"{question.name} needs {folder}, which `make {target}` writes"
    if question.name in names:
        raise UserError(f"{problem}.")
    screen.log(f"left out: {problem}")
    return False


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablations", description=__doc__)
    parser.add_argument("--questions", nargs="+", default=[], metavar="NAME", help="questions to answer; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each arm")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override in the config of all students"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="folder for datasets and students")
    parser.add_argument("--address", help="Ray cluster with access to the folder; default: a local one")
    return parser


if __name__ == "__main__":
    options = make_parser().parse_args()
    try:
        main(options.out, options.questions, options.seeds, options.set, options.address)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except (Stopped, KeyboardInterrupt) as stopped:
        print("stopped: the same command resumes from finished trainings and the last checkpoints")
        raise SystemExit(stopped.status if isinstance(stopped, Stopped) else 130) from None
