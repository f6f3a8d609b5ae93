"""python -m benchmarks.ablations: see ``make ablations``."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ablations import page
from benchmarks.ablations.arms import Study
from benchmarks.ablations.found import answer, training_of
from benchmarks.ablations.questions import questions
from reinforce.errors import UserError
from reinforce.terminal import Screen
from reinforce.training.stop import Stopped

OUT = Path("demo/ablations")


def main(out: Path, names: Sequence[str], seeds: int, changes: Sequence[str], address: str | None) -> None:
    """Answer the questions, from where an earlier start left off. Raises UserError, and Stopped after a signal."""
    from benchmarks.ablations.trainings import make_datasets, train_all
    from reinforce.cluster import ray_cluster

    study, screen = Study(out, changes), Screen()
    every = questions(study)
    if unknown := [name for name in names if name not in every]:
        raise UserError(f"there is no question {', '.join(unknown)}; there are: {', '.join(every)}.")
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: want 1 or more, and 3 to tell a spread.")
    chosen = [every[name] for name in names or every]
    arms = {arm.name: arm for question in chosen for arm in question.arms}
    written: list[str] = []
    before = page.kept(study, seeds)

    def write() -> None:
        """Write the page anew if a further question is answered; what it has of the same arms stays."""
        here = {name: found for name in every if (found := answer(study, every[name], seeds)) is not None}
        if [*here] != written:
            written[:] = here
            known = {**before, **here}
            answers = [known[name] for name in every if name in known]
            answered = [given.question.name for given in answers]
            page.write(study, answers, page.about(study, seeds, answered, None if out == OUT else out))
            screen.log(f"{page.PAGE} and {page.RESULTS} have: {', '.join(answered)}")

    with contextlib.ExitStack() as stack:
        started: list[bool] = []

        def cluster() -> None:  # once, and where something is left to do
            if not started:
                started.append(True)
                # The seconds of a step are told: they should not be those of a process that yields to all others.
                os.environ.setdefault("RAY_worker_niceness", "0")
                stack.enter_context(ray_cluster(address, log_to_driver=False))

        make_datasets(study, dict.fromkeys(arm.dataset for arm in arms.values()), cluster, screen)
        trainings = [one for arm in arms.values() for seed in range(seeds) if (one := training_of(study, arm, seed))]
        open_ = [training for training in trainings if training.results() is None]
        screen.log(f"{len(arms)} arms, {len(trainings)} trainings, {len(trainings) - len(open_)} of them done")
        write()
        if open_:
            cluster()
            train_all(open_, len(trainings) - len(open_), write, screen)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.ablations", description=__doc__)
    made.add_argument("--questions", nargs="+", default=[], metavar="NAME", help="default: all")
    made.add_argument("--seeds", type=int, default=3, help="of each arm")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of all students' config")
    made.add_argument("--out", type=Path, default=OUT, help="folder for datasets and students")
    made.add_argument("--address", help="of a Ray cluster that reaches the folder; default: one on this machine")
    return made


if __name__ == "__main__":
    given = parser().parse_args()
    try:
        main(given.out, given.questions, given.seeds, given.set, given.address)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except (Stopped, KeyboardInterrupt) as stopped:
        print("stopped: the same command goes on from what is finished and from the last checkpoints")
        raise SystemExit(stopped.status if isinstance(stopped, Stopped) else 130) from None
