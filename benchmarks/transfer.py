"""Does a student learn from stored embeddings what its own pictures cannot teach? ``make bench-transfer``.

The two students of `make demo`, each from several seeds, which decide its first weights and the order of the samples.
Reads demo/dataset and demo/tests, so run `make demo` first; goes on where it was when it is started again. Writes
docs/transfer.md beside the numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from reinforce.demo.compare import ARMS, MEASURES, SECONDS, changes, print_table, table_of
from reinforce.demo.students import train_side_by_side
from reinforce.shipping.machine import machine_name

RESULTS = Path(__file__).parent / "results" / "transfer.json"
PAGE = Path(__file__).parents[1] / "docs" / "transfer.md"
_TEXT = """\
# What a student learns from stored embeddings

The demo's two students, of {steps} equal steps from equal first weights, {seeds} seeds of each. Both learn from Twemoji
alone. The plain one has the pictures and their captions (lambda 0), the distilled one all that the reinforced dataset
holds: the teachers' embeddings (lambda 1) and a captioner's captions.

```console
make demo               # makes the dataset, and one pair of students
make bench-transfer     # {seeds} seeds of each; writes this page and benchmarks/results/transfer.json
```

The mean, and from the lowest to the highest seed ({machine}, torch {torch}):

| | plain | distilled | times |
|---|---|---|---|
{rows}

Each picture is to be named among the names of all concepts:

- *own style*: the Twemoji pictures that both students learnt from.
- *(a) unseen style*: OpenMoji pictures of about three quarters of the concepts. The teachers learnt them, no student
  ever saw one: what the distilled student knows of them beyond the plain one came through stored embeddings of Twemoji
  pictures. This is the test of transfer.
- *(b) unseen pictures*: OpenMoji pictures of the other concepts, which no teacher saw either. This is the harder test,
  of what generalises.
- *subgroup right*: the name that was chosen is at least of the right one of Unicode's subgroups, such as food-fruit.
- *retrieval R@5*: the right picture is among the five nearest to a caption, of those of (a).

What the teachers themselves can do stands in [their model card](../configs/demo-models/README.md).
"""
_ROWS = {
    "own_style": "own style",
    "unseen_style": "(a) unseen style",
    "unseen_style_group": "(a) subgroup right",
    "unseen_pictures": "(b) unseen pictures",
    "unseen_pictures_group": "(b) subgroup right",
    "retrieval": "retrieval R@5",
}


def main(out: Path, seeds: int, more: Sequence[str]) -> None:
    """Train ``seeds`` students of each arm, with ``more`` overrides, print the table and write it down."""
    folders = {arm: [out / f"{arm}-{seed}" for seed in range(seeds)] for arm in ARMS}
    train_side_by_side(
        {
            folders[arm][seed].name: [*changes(arm, folders[arm][seed], seed), *more]
            for seed in range(seeds)
            for arm in ARMS
        }
    )
    rows, steps = table_of(folders)
    print_table(f"{seeds} seeds after {steps:,} steps: the mean (from the lowest to the highest)", rows)
    for name in ("unseen_style", "unseen_pictures"):
        plain, distilled = (statistics.fmean(row[name] for row in rows[arm]) for arm in ("plain", "distilled"))
        print(f"{MEASURES[name][0]}: distilled is {distilled / max(plain, 1e-9):.2f} times plain")
    found = {**summary(rows), "steps": steps, "machine": machine_name()}
    found["torch"] = torch.__version__
    RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(page(found, seeds), encoding="utf-8")
    print(f"written to {RESULTS} and {PAGE}")


def summary(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Mean, lowest and highest of each measure of each arm, and all seeds."""
    found: dict[str, Any] = {}
    for arm, seeds in rows.items():
        values = {name: [row[name] for row in seeds] for name in (*MEASURES, SECONDS)}
        found[arm] = {
            name: {"mean": statistics.fmean(v), "min": min(v), "max": max(v), "seeds": v} for name, v in values.items()
        }
    return found


def page(found: Mapping[str, Any], seeds: int) -> str:
    """docs/transfer.md of what was found."""
    lines = []
    for name, title in _ROWS.items():
        cells = [
            f"{value['mean']:.1%} ({value['min']:.1%} to {value['max']:.1%})"
            for value in (found[arm][name] for arm in ("plain", "distilled"))
        ]
        times = found["distilled"][name]["mean"] / max(found["plain"][name]["mean"], 1e-9)
        lines.append(f"| {title} | {' | '.join(cells)} | {times:.2f} |")
    plain, distilled = (found[arm][SECONDS]["mean"] for arm in ("plain", "distilled"))
    lines.append(f"| seconds a step | {plain:.2f} | {distilled:.2f} | {distilled / plain:.2f} |")
    return _TEXT.format(
        **{key: found[key] for key in ("steps", "machine", "torch")}, seeds=seeds, rows="\n".join(lines)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo/transfer"), help="folder for the trainings")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of configs/student-demo.yaml")
    arguments = parser.parse_args()
    main(arguments.out, arguments.seeds, arguments.set)
