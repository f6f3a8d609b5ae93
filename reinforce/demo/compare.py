"""The demo's question: does a student learn from stored embeddings what its own pictures cannot teach?

Two students of equal steps and equal starts, one plain (lambda 0, true captions alone), one from all that the dataset
holds, beside each other: a table, curves, and results.json.
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

#: What each student has otherwise than CONFIG.
ARMS: Mapping[str, Sequence[str]] = {"plain": ("loss.lambda=0", "data.captioners=[]"), "distilled": ()}
CONFIG = "configs/student-demo.yaml"

#: Name in results.json -> (title of the column, metric of the training).
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
own style        the Twemoji pictures that both students learnt from
unseen style     OpenMoji pictures of three quarters of the concepts: teachers learnt them, no student ever saw one
unseen pictures  OpenMoji pictures of the other concepts, which no teacher saw either
                 Each picture is to be named among the names of all concepts; `subgroup`: the name chosen is at least of
                 the right one of Unicode's subgroups, such as food-fruit.
retrieval        the right picture is among the five nearest to a caption, of those of the unseen style"""
_NEXT = """\
What was made
  {students}/distilled/student
      the distilled student, which plain open_clip loads by local-dir:{students}/distilled/student
  {out}/results.json, {out}/curves.png
      the table above as numbers, and accuracy over steps
  demo/dataset, demo/sample.png
      the reinforced dataset, and a picture of some of it

What to try next
  reinforce run configs/demo.yaml
      the same run again: nothing is missing, so nothing is computed
  reinforce train configs/student-demo.yaml --set train.steps=1000 --set output=demo/students/longer
      a longer training
  reinforce evaluate {students}/plain {students}/distilled --config configs/student-demo.yaml
      both students, judged again
  make bench-transfer
      this table over three seeds; it writes docs/transfer.md
  docs/README.md
      reading a dataset, your own data, your own teachers"""


def changes(arm: str, folder: str | Path, seed: int = 0) -> list[str]:
    """What one of ARMS, which writes to ``folder``, has otherwise than CONFIG, for `reinforce train --set`."""
    return [*ARMS[arm], f"output={folder}", f"seed={seed}"]


def student_config(arm: str, folder: str | Path, seed: int = 0, more: Sequence[str] = ()) -> StudentConfig:
    """The config of one of ARMS. Raises UserError."""
    return load_student_config(CONFIG, [*changes(arm, folder, seed), *more])


def measures(results: Results) -> dict[str, float]:
    """What results.json says of one student. Raises UserError where the training was judged by other sets."""
    try:
        found = {name: results.metrics[metric] for name, (_, metric) in MEASURES.items()}
    except KeyError as error:
        raise UserError(f"{results.output} was not judged by {error}: train it with {CONFIG}.") from None
    return {**{name: float(value or 0.0) for name, value in found.items()}, SECONDS: results.seconds_per_step}


def compare(students: str | Path, out: str | Path) -> None:
    """Print the table of the students in ``students``/ARM; write ``out``/results.json and ``out``/curves.png.

    Raises UserError where a training has not ended.
    """
    rows, steps = table_of({arm: [Path(students) / arm] for arm in ARMS})
    values = {arm: row for arm, (row,) in rows.items()}
    print_table(f"two students after {steps:,} steps", rows)
    (Path(out) / "results.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    draw(Path(students), str(Path(out) / "curves.png"))
    print(f"{SPLITS}\n\n{_NEXT.format(students=students, out=out)}")


def table_of(folders: Mapping[str, Sequence[Path]]) -> tuple[dict[str, list[dict[str, float]]], int]:
    """The measures of each training of each name, and how many steps all have learnt for.

    Raises UserError where a training has not ended, and where their steps differ.
    """
    found = {name: [_results(folder) for folder in several] for name, several in folders.items()}
    steps = {results.steps for several in found.values() for results in several}
    if len(steps) > 1:
        raise UserError(f"the students learnt for {' and '.join(map(str, sorted(steps)))} steps: train them alike.")
    return {name: [measures(results) for results in several] for name, several in found.items()}, steps.pop()


def print_table(title: str, rows: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """A row for each name: shares as percentages, the mean and, of several, from the lowest to the highest."""
    table = Table(title=title)
    table.add_column("student")
    for heading in (*(column for column, _ in MEASURES.values()), "s a step"):
        table.add_column(heading, justify="right")
    for name, seeds in rows.items():
        cells = [_share([row[measure] for row in seeds]) for measure in MEASURES]
        table.add_row(name, *cells, f"{sum(row[SECONDS] for row in seeds) / len(seeds):.2f}")
    Console(width=max(Console().width, 120)).print(table)


def draw(students: Path, url: str) -> None:
    """Accuracy over steps, on pictures of the own and of the unseen style."""
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


def _results(folder: Path) -> Results:
    results = read_results(Storage(str(folder)))
    if results is None:
        raise UserError(f"{folder} has no finished training. Run `python -m reinforce.demo students` first.")
    return results


def _share(values: Sequence[float]) -> str:
    mean = f"{sum(values) / len(values):.1%}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1%} to {max(values):.1%})"
