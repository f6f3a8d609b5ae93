"""The demo's comparison: does a student learn from stored embeddings what its own pictures cannot teach?

Two students with equal steps and equal initial weights: *plain* (lambda 0, true captions only) and *distilled* (all
layers of the dataset). The results are a table, curves, and results.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from reinforce import plots
from reinforce.errors import UserError
from reinforce.storage import Storage
from reinforce.student.config import StudentConfig, load_student_config
from reinforce.training.log import LOG
from reinforce.training.results import Results, read_results

#: Overrides of CONFIG for each student.
ARMS: Mapping[str, Sequence[str]] = {"plain": ("loss.lambda=0", "data.captioners=[]"), "distilled": ()}
CONFIG = "configs/student-demo.yaml"

#: Name in results.json -> (column title, metric of the training).
MEASURES: Mapping[str, tuple[str, str]] = {
    "own_style": ("own style", "zero_shot/own-style/top1"),
    "unseen_style": ("unseen style", "zero_shot/unseen-style/top1"),
    "unseen_style_group": ("subgroup", "zero_shot/unseen-style/group"),
    "unseen_pictures": ("unseen pictures", "zero_shot/unseen-pictures/top1"),
    "unseen_pictures_group": ("subgroup", "zero_shot/unseen-pictures/group"),
    "retrieval": ("retrieval R@5", "retrieval/unseen-style/text_to_image/r5"),
}
SECONDS = "seconds_per_step"
SPLITS = """\
own style        Twemoji pictures, on which both students were trained
unseen style     OpenMoji pictures of three quarters of the concepts; the teachers were trained on them, no student was
unseen pictures  OpenMoji pictures of the other concepts, on which no teacher was trained either
                 These are top-1 accuracies of zero-shot classification among all concepts. `subgroup`: the predicted
                 concept is in the right one of Unicode's subgroups, such as food-fruit.
retrieval        the right picture is among the five nearest to a caption, for the pictures of the unseen style"""
_NEXT = """\
Output
  {students}/distilled/student
      the distilled student, which plain open_clip loads by local-dir:{students}/distilled/student
  {out}/results.json, {out}/curves.png
      the table above as numbers, and accuracy over steps
  demo/dataset, demo/sample.png
      the reinforced dataset, and a contact sheet of some samples

Next steps
  reinforce run configs/demo.yaml
      run again: nothing is missing, so nothing is computed
  reinforce train configs/student-demo.yaml --set train.steps=1000 --set output=demo/students/longer
      train longer
  reinforce evaluate {students}/plain {students}/distilled --config configs/student-demo.yaml
      evaluate both students again
  make bench-transfer
      this table over three seeds; writes docs/transfer.md
  docs/README.md
      how to read a dataset, and to use your own data and teachers"""


def arm_overrides(arm: str, folder: str | Path, seed: int = 0) -> list[str]:
    """Return the overrides of CONFIG for one of ARMS with output ``folder``, for `reinforce train --set`."""
    return [*ARMS[arm], f"output={folder}", f"seed={seed}"]


def student_config(arm: str, folder: str | Path, seed: int = 0, more: Sequence[str] = ()) -> StudentConfig:
    """Return the config of one of ARMS, with ``more`` overrides. Raises UserError."""
    return load_student_config(CONFIG, [*arm_overrides(arm, folder, seed), *more])


def read_measures(results: Results) -> dict[str, float]:
    """Return the entry of results.json for a student. Raises UserError if the training lacks one of MEASURES."""
    try:
        values = {name: results.metrics[metric] for name, (_, metric) in MEASURES.items()}
    except KeyError as error:
        raise UserError(f"{results.output} was not evaluated by {error}: train it with {CONFIG}.") from None
    return {**{name: float(value or 0.0) for name, value in values.items()}, SECONDS: results.seconds_per_step}


def compare_students(students: str | Path, out: str | Path) -> None:
    """Print the table of the students in ``students``/ARM; write ``out``/results.json and ``out``/curves.png.

    Raises UserError if a training is not finished.
    """
    rows, steps = collect_measures({arm: [Path(students) / arm] for arm in ARMS})
    values = {arm: row for arm, (row,) in rows.items()}
    print_table(f"two students after {steps:,} steps", rows)
    (Path(out) / "results.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    draw_curves(Path(students), str(Path(out) / "curves.png"))
    print(f"{SPLITS}\n\n{_NEXT.format(students=students, out=out)}")


def collect_measures(folders: Mapping[str, Sequence[Path]]) -> tuple[dict[str, list[dict[str, float]]], int]:
    """Return the measures of each training by name, and the number of steps.

    Raises UserError if a training is not finished, or if their numbers of steps differ.
    """
    trainings = {name: [_read_results(folder) for folder in several] for name, several in folders.items()}
    steps = {results.steps for several in trainings.values() for results in several}
    if len(steps) > 1:
        counts = " and ".join(map(str, sorted(steps)))
        raise UserError(f"the students were trained for {counts} steps: train them for equal steps.")
    return {name: [read_measures(results) for results in several] for name, several in trainings.items()}, steps.pop()


def print_table(title: str, rows: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Print one row for each name, with percentages; for several seeds the mean (minimum to maximum)."""
    table = Table(title=title)
    table.add_column("student")
    for heading in (*(column for column, _ in MEASURES.values()), "s/step"):
        table.add_column(heading, justify="right")
    for name, seeds in rows.items():
        cells = [_format_share([row[measure] for row in seeds]) for measure in MEASURES]
        table.add_row(name, *cells, f"{sum(row[SECONDS] for row in seeds) / len(seeds):.2f}")
    Console(width=max(Console().width, 120)).print(table)


def draw_curves(students: Path, url: str) -> None:
    """Draw the accuracy of both students over steps, with a panel for each of three test sets."""
    shown = {name: MEASURES[name] for name in ("own_style", "unseen_style", "unseen_pictures")}
    figure, axes = plots.figure(len(shown), width=13.0, height=3.8)
    for panel, (title, metric) in zip(axes, shown.values(), strict=True):
        for index, arm in enumerate(ARMS):
            rows = [json.loads(line) for line in (students / arm / LOG).read_text(encoding="utf-8").splitlines()]
            points = [(row["step"], row["metrics"][metric]) for row in rows if metric in row.get("metrics", {})]
            panel.plot(*zip(*points, strict=True), marker="o", color=plots.colour(index), label=arm)
        panel.set_ylim(bottom=0)
        plots.label(panel, title, "step", "zero-shot accuracy")
        plots.legend(panel)
    plots.save(figure, url)


def _read_results(folder: Path) -> Results:
    results = read_results(Storage(str(folder)))
    if results is None:
        raise UserError(f"{folder} has no finished training. Run `python -m reinforce.demo students` first.")
    return results


def _format_share(values: Sequence[float]) -> str:
    mean = f"{sum(values) / len(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1%} to {max(values):.1%})"
