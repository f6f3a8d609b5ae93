"""The demo's comparison: does a student learn from stored embeddings what its own pictures cannot teach?

A *plain* student (lambda 0, true captions only) and a *distilled* one (all layers of the dataset), with equal steps and
equal initial weights; once with the right captions, and once where 40 % of the captions belong to other pictures. The
results are a table, a picture and results.json.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from reinforce import reports, settings
from reinforce.errors import UserError
from reinforce.storage import Storage
from reinforce.student.config import StudentConfig
from reinforce.training.results import Results, read_results

_PLAIN, _NOISY = ("loss.lambda=0", "data.captioners=[]"), ("data.datasets=demo/noisy-dataset",)
#: Overrides of CONFIG for each student.
ARMS: Mapping[str, Sequence[str]] = {
    "plain": _PLAIN,
    "distilled": (),
    "plain-noisy": (*_PLAIN, *_NOISY),
    "distilled-noisy": _NOISY,
}
CONFIG = "configs/student-demo.yaml"
#: Captions -> the plain and the distilled student that are compared.
PAIRS: Mapping[str, tuple[str, str]] = {
    "right captions": ("plain", "distilled"),
    "40 % of the captions wrong": ("plain-noisy", "distilled-noisy"),
}

#: Name in results.json -> (title, metric of the training run), the tests first.
MEASURES: Mapping[str, tuple[str, str]] = {
    "unseen_style": ("unseen style", "zero_shot/unseen-style/top1"),
    "unseen_pictures": ("unseen pictures", "zero_shot/unseen-pictures/top1"),
    "unseen_icons": ("unseen icons", "zero_shot/unseen-icons/top1"),
    "unseen_style_group": ("unseen style, subgroup", "zero_shot/unseen-style/group"),
    "unseen_pictures_group": ("unseen pictures, subgroup", "zero_shot/unseen-pictures/group"),
    "unseen_icons_group": ("unseen icons, subgroup", "zero_shot/unseen-icons/group"),
    "retrieval": ("retrieval, unseen style", "retrieval/unseen-style/text_to_image/r5"),
    "own_style": ("training pictures", "zero_shot/own-style/top1"),
}
#: Measures with a row in the demo's table, and those with bars in its picture.
SHOWN = ("unseen_style", "unseen_pictures", "unseen_icons", "retrieval", "own_style")
DRAWN = SHOWN[:4]
SECONDS = "seconds_per_step"
_SETS = """\
Top-1 accuracy among 1,364 names. Of OpenMoji's unseen style, teachers saw the drawings; of its unseen pictures and of
the icons of two fonts, no model saw any. Retrieval: the right picture is among the five nearest to a caption. The
training pictures are no test: a student that learns them by heart is good there. Figures of one seed are noisy; those
of three seeds are in docs/ablations.md."""
_NEXT = """\
Look at the dataset     open {out}/report/index.html
See the table as bars   open {out}/summary.png
Use the student         reinforce.Student.load("{students}/distilled")
Your own data           docs/data.md; step by step: docs/tutorial.md"""


def arm_overrides(arm: str, folder: str | Path, seed: int = 0) -> list[str]:
    """Return the overrides of CONFIG for one of ARMS with output ``folder``, for `reinforce train --set`."""
    return [*ARMS[arm], f"output={folder}", f"seed={seed}"]


def student_config(arm: str, folder: str | Path, seed: int = 0, more: Sequence[str] = ()) -> StudentConfig:
    """Return the config of one of ARMS, with ``more`` overrides. Raises UserError."""
    return settings.load(StudentConfig, CONFIG, [*arm_overrides(arm, folder, seed), *more])


def read_measures(results: Results) -> dict[str, float]:
    """Return the entry of results.json for a student. Raises UserError if the training run lacks one of MEASURES."""
    try:
        values = {name: results.metrics[metric] for name, (_, metric) in MEASURES.items()}
    except KeyError as error:
        raise UserError(f"{results.output} was not evaluated by {error}: train it with {CONFIG}.") from None
    return {**{name: float(value or 0.0) for name, value in values.items()}, SECONDS: results.seconds_per_step}


def compare_students(students: str | Path, out: str | Path) -> None:
    """Print the table of the students in ``students``/ARM; write ``out``/results.json and ``out``/summary.png.

    Raises UserError if a training run is not finished.
    """
    rows, steps = collect_measures({arm: [Path(students) / arm] for arm in ARMS})
    (Path(out) / "results.json").write_text(
        json.dumps({arm: row for arm, (row,) in rows.items()}, indent=2) + "\n", encoding="utf-8"
    )
    print_table(f"a plain and a distilled student after {steps:,} equal steps on Twemoji", rows)
    draw_summary(rows, str(Path(out) / "summary.png"))
    print(f"{_SETS}\n\n{_NEXT.format(students=students, out=out)}")


def collect_measures(folders: Mapping[str, Sequence[Path]]) -> tuple[dict[str, list[dict[str, float]]], int]:
    """Return the measures of each training run by name, and the number of steps.

    Raises UserError if a training run is not finished, or if their numbers of steps differ.
    """
    trainings = {name: [_read_results(folder) for folder in several] for name, several in folders.items()}
    steps = {results.steps for several in trainings.values() for results in several}
    if len(steps) > 1:
        counts = " and ".join(map(str, sorted(steps)))
        raise UserError(f"the students were trained for {counts} steps: train them for equal steps.")
    return {name: [read_measures(results) for results in several] for name, several in trainings.items()}, steps.pop()


def print_table(title: str, rows: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Print one row for each of SHOWN, with means; for several seeds also minimum to maximum."""
    table = Table(title=title)
    table.add_column("")
    for captions, (plain, _) in PAIRS.items():
        for heading in (f"{captions}:\n{plain.partition('-')[0]}", "\ndistilled", "\ntimes"):
            table.add_column(heading, justify="right")
    for name in SHOWN:
        cells = []
        for arms in PAIRS.values():
            values = [[row[name] for row in rows[arm]] for arm in arms]
            cells += [*map(format_share, values), f"{ratio(*values):.1f}" if any(values[0]) else "-"]
        table.add_row(MEASURES[name][0], *cells)
    Console(width=max(Console().width, 120)).print(table)


def ratio(plain: Sequence[float], distilled: Sequence[float]) -> float:
    """The mean of the distilled students divided by that of the plain ones."""
    return statistics.fmean(distilled) / max(statistics.fmean(plain), 1e-9)


def format_share(values: Sequence[float]) -> str:
    """The mean in percent; of several values also minimum to maximum."""
    mean = f"{statistics.fmean(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1%} to {max(values):.1%})"


def draw_summary(rows: Mapping[str, Sequence[Mapping[str, float]]], url: str) -> None:
    """Draw a bar for each of DRAWN and each student, a panel for each pair; error bars are minimum to maximum."""
    figure, axes = reports.figure(len(PAIRS), width=11.0, height=3.6)
    top = max(value[name] for arm in ARMS for value in rows[arm] for name in DRAWN)
    for panel, (captions, arms) in zip(axes, PAIRS.items(), strict=True):
        for index, arm in enumerate(arms):
            values = [[100 * row[name] for row in rows[arm]] for name in DRAWN]
            means = [statistics.fmean(several) for several in values]
            places = [place + 0.38 * (index - 0.5) for place in range(len(DRAWN))]
            errors = [[m - min(v) for m, v in zip(means, values, strict=True)]]
            errors.append([max(v) - m for m, v in zip(means, values, strict=True)])
            bars = panel.bar(
                *(places, means),
                width=0.36,
                yerr=errors if len(rows[arm]) > 1 else None,
                capsize=3,
                color=reports.colour(7 if index == 0 else 0),
                label=arm.partition("-")[0],
            )
            panel.bar_label(bars, fmt="%.1f", padding=2, fontsize=9)
        panel.set_xticks(range(len(DRAWN)), [MEASURES[name][0].replace(", ", "\n") for name in DRAWN])
        panel.set_ylim(0, 115 * top)
        reports.label(panel, captions, "", "percent right")
        reports.legend(panel)
    reports.save(figure, url)


def _read_results(folder: Path) -> Results:
    results = read_results(Storage(str(folder)))
    if results is None:
        raise UserError(f"{folder} has no finished training. Run `python -m examples.demo students` first.")
    return results
