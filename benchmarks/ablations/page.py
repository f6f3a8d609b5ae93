"""docs/ablations.md with its figures, and the numbers as JSON."""

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

from benchmarks.ablations import figures
from benchmarks.ablations.arms import Study
from benchmarks.ablations.claims import ERRORS, ERRORS_OF_PICKED, Verdict, agreement
from benchmarks.ablations.measures import ALL_MEASURES
from benchmarks.ablations.questions import Question, make_questions
from benchmarks.ablations.results import Answer
from benchmarks.stored import markdown_table
from reinforce.storage import write_file, write_json

RESULTS = Path(__file__).parents[1] / "results" / "ablations.json"
PAGE = Path(__file__).parents[2] / "docs" / "ablations.md"
_TRANSFER = "\n<!-- transfer:"
_PROGRAM, _SEEDS = "python -m benchmarks.ablations", 3
_TEXT = """\
# Ablations at the demo's scale

MobileCLIP ([2311.17049](https://arxiv.org/abs/2311.17049)) and MobileCLIP2
([2508.20691](https://arxiv.org/abs/2508.20691)) report what matters in dataset reinforcement. This page repeats their
ablations with the demo's data: students trained for {steps:,} steps with batches of {batch:,} samples, unless a
question says otherwise, {seeds} seeds per arm. The seed determines the initial weights and the sample order. Unlike the
demo's, these students distil similarities only, except where features are the question. Results for trainings of
minutes need not hold for trainings of days, and vice versa.

```console
make demo                 # writes the training shards and the test sets
make demo-teachers        # only for the question of the captioner's pre-trained state; an hour
make demo-specialists     # only for the question of teachers that know different things; minutes
{command}
```

{summary}
{unanswered}
Tables show the mean over the seeds ± the sample standard deviation. Two arms count as different if their means
differ by more than the noise: {errors:g} standard errors of a difference, or {picked:g} where the best or worst of
several arms is chosen. The standard error is estimated from the deviations of all arms of a question. *Level* means
that {seeds} seeds do not show a difference. The sets are those
[below](#what-a-student-learns-from-stored-embeddings): top-1 accuracy of zero-shot classification among all concepts,
and for retrieval whether the right picture is among the five nearest to a caption. Seconds are for one core per
training, with as many parallel trainings as cores (torch {torch};
{machines}).
"""
_SECTION = """
## {title}

{paper}

{table}

![{title}](ablations/{name}.png)

**These results {agreement}.**

{rest}
"""


@dataclass(frozen=True)
class StudyInfo:
    """What all students have in common. The field names are keys of results/ablations.json.

    ``command`` regenerates the page with its questions, ``unanswered`` are the titles of the others, and ``changes``
    are the overrides of the students' config.
    """

    command: str
    unanswered: Sequence[str]
    steps: int
    batch: int
    seeds: int
    changes: Sequence[str]
    torch: str


def describe_study(study: Study, seeds: int, answered: Sequence[str], out: Path | None = None) -> StudyInfo:
    """Describe a study with these answered questions; ``out`` is its folder, unless it is the default one."""
    questions = make_questions(study)
    unanswered = [question.title for name, question in questions.items() if name not in answered]
    words = ["--questions", *answered] if unanswered else []
    words += ["--seeds", str(seeds)] if seeds != _SEEDS else []
    words += [word for override in study.overrides for word in ("--set", override)]
    words += ["--out", str(out)] if out is not None else []
    command = " ".join([_PROGRAM, shlex.join(words)]).strip()
    return StudyInfo(command, unanswered, study.steps, study.batch, seeds, study.overrides, torch.__version__)


def read_stored_answers(study: Study, seeds: int, results: Path = RESULTS) -> dict[str, Answer]:
    """Read the stored answers with equal arms, steps and seeds, by question; the machine may differ."""
    stored = json.loads(results.read_text()) if results.exists() else {"questions": {}}
    current = json.loads(json.dumps(asdict(describe_study(study, seeds, []))))
    if any(stored.get(key) != value for key, value in current.items() if key not in ("command", "unanswered")):
        return {}
    return {
        name: _from_json(question, stored["questions"][name])
        for name, question in make_questions(study).items()
        if stored["questions"].get(name, {}).get("recipe") == study.recipe(question.arms)
    }


def _from_json(question: Question, stored: Mapping[str, Any]) -> Answer:
    """Read an answer that ``_to_json`` wrote."""
    numbers = {
        label: {
            name: [math.inf if value is None else value for value in values["seeds"]]
            for name, values in arm.items()
            if name != "arm"
        }
        for label, arm in stored["arms"].items()
    }
    return Answer(question, numbers, stored["machine"], stored.get("curves", {}))


def write_page(
    study: Study, answers: Sequence[Answer], info: StudyInfo, page: Path = PAGE, results: Path = RESULTS
) -> None:
    """Write the page, its figures into the folder of its name, and the numbers.

    Figures of questions without an answer are removed. The section of benchmarks/transfer.py stays.
    """
    if not answers:
        return
    checked = [(answer, check_claims(answer)) for answer in answers]
    for answer in answers:
        figures.draw(answer, page.with_suffix("") / f"{answer.question.name}.png")
    for old in page.with_suffix("").glob("*.png"):
        if old.stem not in {answer.question.name for answer in answers}:
            old.unlink()
    by_question = {answer.question.name: _to_json(study, answer, verdicts) for answer, verdicts in checked}
    stored = {**asdict(info), "questions": by_question}
    write_json(stored, str(results))
    _, marker, section = page.read_text("utf-8").partition(_TRANSFER) if page.exists() else ("", "", "")
    write_file((render_page(checked, info) + marker + section).encode(), str(page))


def check_claims(answer: Answer) -> list[Verdict]:
    """Check each claim of the question; empty for a single seed, which has no spread."""
    seeds = min(len(values) for measured in answer.numbers.values() for values in measured.values())
    return [claim.check(answer.numbers) for claim in answer.question.claims] if seeds > 1 else []


def render_page(checked: Sequence[tuple[Answer, Sequence[Verdict]]], info: StudyInfo) -> str:
    """Return the whole page."""
    titles = [(answer.question.title, agreement(verdicts)) for answer, verdicts in checked]
    summary = [(f"[{title}](#{_anchor(title)})", found) for title, found in titles]
    top = _TEXT.format(
        **{key: getattr(info, key) for key in ("steps", "batch", "seeds", "torch")},
        machines=_machines([answer for answer, _ in checked]),
        command="make ablations            # trains the students; writes this page"
        if info.command == _PROGRAM
        else info.command,
        summary=markdown_table(("question", "these results"), summary),
        unanswered=_unanswered(info),
        errors=ERRORS,
        picked=ERRORS_OF_PICKED,
    )
    return top + "".join(_section(answer, verdicts) for answer, verdicts in checked)


def _unanswered(info: StudyInfo) -> str:
    if not info.unanswered:
        return ""
    titles = "\n".join(f"- {title}" for title in info.unanswered)
    return f"\nNot measured yet with this recipe; `make ablations` does it:\n\n{titles}\n"


def _section(answer: Answer, verdicts: Sequence[Verdict]) -> str:
    question = answer.question
    points = "\n".join(f"- {verdict.text}." for verdict in verdicts)
    section = _SECTION.format(
        title=question.title,
        paper=question.paper,
        table=_table(answer),
        name=question.name,
        agreement=agreement(verdicts),
        rest="\n\n".join(filter(None, (points, question.note))),
    )
    return section.rstrip() + "\n"


def _table(answer: Answer) -> str:
    columns = answer.question.columns
    rows = [
        [label, *(ALL_MEASURES[name].format_cell(measured[name]) if name in measured else "" for name in columns)]
        for label, measured in answer.numbers.items()
    ]
    return markdown_table(["", *(ALL_MEASURES[name].title for name in columns)], rows)


def _to_json(study: Study, answer: Answer, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return the entry of a question in results/ablations.json; infinite steps (never) become None."""
    question, arms = answer.question, dict[str, Any]()
    for arm in question.arms:
        measured = answer.numbers[arm.label]
        arms[arm.label] = {"arm": arm.name, **{name: _statistics(values) for name, values in measured.items()}}
    curves = {label: {name: by[name] for name in question.panels} for label, by in answer.curves.items()}
    return {
        "title": question.title,
        "machine": answer.machine,
        "recipe": study.recipe(question.arms),
        "claims": [asdict(verdict) for verdict in verdicts],
        "arms": arms,
        **({"curves": curves} if curves else {}),
    }


def _statistics(values: Sequence[float]) -> dict[str, Any]:
    finite = [value if math.isfinite(value) else None for value in values]
    if None in finite:
        return {"mean": None, "deviation": None, "seeds": finite}
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "seeds": finite}


def _machines(answers: Sequence[Answer]) -> str:
    """Return the machine of most answers, then the others with their questions."""
    by_machine: dict[str, list[str]] = {}
    for answer in answers:
        by_machine.setdefault(answer.machine, []).append(answer.question.title)
    first, *others = sorted(by_machine, key=lambda machine: -len(by_machine[machine]))
    return "; ".join([first, *(f"{machine}, for *{', '.join(by_machine[machine])}*" for machine in others)])


def _anchor(title: str) -> str:
    """Return GitHub's anchor of a heading."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")
