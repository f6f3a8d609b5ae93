"""docs/ablations.md with its pictures, and the numbers as JSON."""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.ablations import pictures
from benchmarks.ablations.arms import Study
from benchmarks.ablations.claims import ERRORS, ERRORS_OF_PICKED, Verdict, agreement
from benchmarks.ablations.found import Answer
from benchmarks.ablations.measures import ALL
from benchmarks.ablations.questions import Question, questions
from reinforce import plots

RESULTS = Path(__file__).parents[1] / "results" / "ablations.json"
PAGE = Path(__file__).parents[2] / "docs" / "ablations.md"
_PROGRAM, _SEEDS = "python -m benchmarks.ablations", 3
_TEXT = """\
# The papers' questions at the demo's scale

MobileCLIP ([2311.17049](https://arxiv.org/abs/2311.17049)) and MobileCLIP2
([2508.20691](https://arxiv.org/abs/2508.20691)) say what matters in dataset reinforcement. Each finding is put to the
demo here: students of {steps:,} steps of {batch:,} samples, {seeds} of each arm, whose seeds decide their first
weights and the order of the samples. What holds for students of minutes need not hold for those of days, and the other
way round.

```console
make demo                 # the shards and the sets to judge by
{command}
```

{summary}

Numbers are the mean over the seeds ± their standard deviation. Two arms count as different where their means are
further apart than the noise, which is {errors:g} standard errors of a difference, {picked:g} where the best or the
worst of several is taken; the error is from the deviations of all arms of the question together. That two arms are
level says that {seeds} seeds do not tell them apart. *Own style* and the other sets are those of the demo: each picture
is to be named among the names of all concepts, and for retrieval the right picture is to be among the five nearest to a
caption. Seconds are of one core each, with as many trainings side by side as there are cores (torch {torch};
{machines}).
"""
_SECTION = """
## {title}

{paper}

{table}

![{title}](ablations/{name}.png)

**The numbers here {agreement}.**

{rest}
"""


@dataclass(frozen=True)
class About:
    """What is told of all students: ``steps`` of ``batch`` samples, ``seeds`` of each arm, ``changes`` of the config.

    ``command`` makes the page anew, with the questions that it has.
    """

    command: str
    steps: int
    batch: int
    seeds: int
    changes: Sequence[str]
    torch: str


def about(study: Study, seeds: int, answered: Sequence[str], out: Path | None = None) -> About:
    """``out`` is named where it is not the default folder."""
    words = [] if len(answered) == len(questions(study)) else ["--questions", *answered]
    words += ["--seeds", str(seeds)] if seeds != _SEEDS else []
    words += [word for change in study.changes for word in ("--set", change)]
    words += ["--out", str(out)] if out is not None else []
    command = " ".join([_PROGRAM, shlex.join(words)]).strip()
    return About(command, study.steps, study.batch, seeds, study.changes, torch.__version__)


def kept(study: Study, seeds: int, results: Path = RESULTS) -> dict[str, Answer]:
    """Answers by question that ``write`` wrote down, of equal arms, steps and seeds, on whichever machine."""
    found = json.loads(results.read_text()) if results.exists() else {"questions": {}}
    now = json.loads(json.dumps(asdict(about(study, seeds, []))))
    if any(found.get(key) != value for key, value in now.items() if key != "command"):
        return {}
    return {
        name: _answer(question, found["questions"][name])
        for name, question in questions(study).items()
        if found["questions"].get(name, {}).get("recipe") == study.recipe(question.arms)
    }


def _answer(question: Question, found: Mapping[str, Any]) -> Answer:
    """What ``_numbers`` has of it."""
    numbers = {
        label: {
            name: [math.inf if value is None else value for value in values["seeds"]]
            for name, values in arm.items()
            if name != "arm"
        }
        for label, arm in found["arms"].items()
    }
    return Answer(question, numbers, found["machine"], found.get("curves", {}))


def write(study: Study, answers: Sequence[Answer], told: About, page: Path = PAGE, results: Path = RESULTS) -> None:
    """Write the page, its pictures into a folder of its name beside it, and the numbers.

    Nothing stays there of questions without an answer.
    """
    if not answers:
        return
    judged = [(given, verdicts_of(given)) for given in answers]
    for given in answers:
        pictures.draw(given, page.with_suffix("") / f"{given.question.name}.png")
    for old in page.with_suffix("").glob("*.png"):
        if old.stem not in {given.question.name for given in answers}:
            old.unlink()
    by_question = {given.question.name: _numbers(study, given, verdicts) for given, verdicts in judged}
    found = {**asdict(told), "questions": by_question}
    plots.write_file((json.dumps(found, indent=2) + "\n").encode(), str(results))
    plots.write_file(text(judged, told).encode(), str(page))


def verdicts_of(given: Answer) -> list[Verdict]:
    """What the numbers say to each claim; nothing where there is one seed alone."""
    seeds = min(len(values) for measured in given.numbers.values() for values in measured.values())
    return [claim.judge(given.numbers) for claim in given.question.claims] if seeds > 1 else []


def text(judged: Sequence[tuple[Answer, Sequence[Verdict]]], told: About) -> str:
    """The whole page."""
    rows = ["| question | the numbers here |", "|---|---|"]
    for given, verdicts in judged:
        title = given.question.title
        rows.append(f"| [{title}](#{_anchor(title)}) | {agreement(verdicts)} |")
    top = _TEXT.format(
        **{key: getattr(told, key) for key in ("steps", "batch", "seeds", "torch")},
        machines=_machines(judged),
        command="make ablations            # this page" if told.command == _PROGRAM else told.command,
        summary="\n".join(rows),
        errors=ERRORS,
        picked=ERRORS_OF_PICKED,
    )
    return top + "".join(_section(given, verdicts) for given, verdicts in judged)


def _section(given: Answer, verdicts: Sequence[Verdict]) -> str:
    question = given.question
    points = "\n".join(f"- {verdict.text}." for verdict in verdicts)
    made = _SECTION.format(
        title=question.title,
        paper=question.paper,
        table=_table(given),
        name=question.name,
        agreement=agreement(verdicts),
        rest="\n\n".join(filter(None, (points, question.note))),
    )
    return made.rstrip() + "\n"


def _table(given: Answer) -> str:
    columns = given.question.columns
    lines = [f"| | {' | '.join(ALL[name].title for name in columns)} |", f"|---|{'---|' * len(columns)}"]
    for label, measured in given.numbers.items():
        cells = [ALL[name].cell(measured[name]) if name in measured else "" for name in columns]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _numbers(study: Study, given: Answer, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What results/ablations.json has of a question; None stands for never."""
    arms: dict[str, Any] = {}
    for arm in given.question.arms:
        measured = given.numbers[arm.label]
        arms[arm.label] = {"arm": arm.name, **{name: _spread(values) for name, values in measured.items()}}
    curves = {label: {name: by[name] for name in given.question.panels} for label, by in given.curves.items()}
    judged = [asdict(verdict) for verdict in verdicts]
    of_it = {"title": given.question.title, "machine": given.machine, "recipe": study.recipe(given.question.arms)}
    return {**of_it, "claims": judged, "arms": arms, **({"curves": curves} if curves else {})}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    finite = [value if math.isfinite(value) else None for value in values]
    if None in finite:
        return {"mean": None, "deviation": None, "seeds": finite}
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "seeds": finite}


def _machines(judged: Sequence[tuple[Answer, Sequence[Verdict]]]) -> str:
    by_machine: dict[str, list[str]] = {}
    for given, _ in judged:
        by_machine.setdefault(given.machine, []).append(given.question.title)
    first, *others = sorted(by_machine, key=lambda machine: -len(by_machine[machine]))
    return "; ".join([first, *(f"{machine}, for *{', '.join(by_machine[machine])}*" for machine in others)])


def _anchor(title: str) -> str:
    """As GitHub makes it of a heading."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")
