"""``make bench-transfer``: does a student learn from stored embeddings what its own pictures cannot teach?

Trains the two students of `make demo` with several seeds, which determine the initial weights and the sample order.
Reads demo/dataset and demo/tests, so run `make demo` first. An interrupted benchmark resumes. Writes docs/transfer.md
and benchmarks/results/transfer.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from reinforce.demo.compare import ARMS, MEASURES, SECONDS, arm_overrides, collect_measures, print_table
from reinforce.demo.students import train_side_by_side
from reinforce.shipping.machine import machine_name

RESULTS = Path(__file__).parent / "results" / "transfer.json"
PAGE = Path(__file__).parents[1] / "docs" / "transfer.md"
_TEXT = """\
# What a student learns from stored embeddings

The demo's two students are trained for {steps} steps from the same initial weights, with {seeds} seeds each. Both are
trained on Twemoji pictures only. The plain student uses the pictures and their captions (lambda 0). The distilled
student uses everything in the reinforced dataset: the teachers' embeddings (lambda 1) and synthetic captions.

```console
make demo               # makes the dataset and one pair of students
make bench-transfer     # trains {seeds} seeds of each; writes this page and benchmarks/results/transfer.json
```

Mean, with minimum to maximum over the seeds ({machine}, torch {torch}):

| | plain | distilled | ratio |
|---|---|---|---|
{rows}

The accuracies are top-1 accuracies of zero-shot classification among all concepts:

- *own style*: the Twemoji pictures on which both students were trained.
- *(a) unseen style*: OpenMoji pictures of about three quarters of the concepts. The teachers were trained on them, the
  students were not. What the distilled student gains over the plain one comes only from stored embeddings of Twemoji
  pictures, so this measures transfer.
- *(b) unseen pictures*: OpenMoji pictures of the other concepts, on which no teacher was trained either. This is the
  harder test and measures generalization.
- *subgroup right*: the predicted concept is in the right one of Unicode's subgroups, such as food-fruit.
- *retrieval R@5*: the right picture is among the five nearest to a caption, for the pictures of (a).

The accuracy of the teachers is in [their model card](../configs/demo-models/README.md).
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
    """Train ``seeds`` students of each arm with ``more`` overrides; print and write the results."""
    folders = {arm: [out / f"{arm}-{seed}" for seed in range(seeds)] for arm in ARMS}
    train_side_by_side(
        {
            folders[arm][seed].name: [*arm_overrides(arm, folders[arm][seed], seed), *more]
            for seed in range(seeds)
            for arm in ARMS
        }
    )
    rows, steps = collect_measures(folders)
    print_table(f"{seeds} seeds after {steps:,} steps: mean (minimum to maximum)", rows)
    for name in ("unseen_style", "unseen_pictures"):
        plain, distilled = (statistics.fmean(row[name] for row in rows[arm]) for arm in ("plain", "distilled"))
        print(f"{MEASURES[name][0]}: distilled is {distilled / max(plain, 1e-9):.2f} times plain")
    results = {**summarise(rows), "steps": steps, "machine": machine_name()}
    results["torch"] = torch.__version__
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(render_page(results, seeds), encoding="utf-8")
    print(f"written to {RESULTS} and {PAGE}")


def summarise(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Return mean, minimum, maximum and all seeds of each measure of each arm."""
    results: dict[str, Any] = {}
    for arm, seeds in rows.items():
        values = {name: [row[name] for row in seeds] for name in (*MEASURES, SECONDS)}
        results[arm] = {
            name: {"mean": statistics.fmean(v), "min": min(v), "max": max(v), "seeds": v} for name, v in values.items()
        }
    return results


def render_page(results: Mapping[str, Any], seeds: int) -> str:
    """Return docs/transfer.md for the content of results/transfer.json."""
    lines = []
    for name, title in _ROWS.items():
        cells = [
            f"{value['mean']:.1%} ({value['min']:.1%} to {value['max']:.1%})"
            for value in (results[arm][name] for arm in ("plain", "distilled"))
        ]
        ratio = results["distilled"][name]["mean"] / max(results["plain"][name]["mean"], 1e-9)
        lines.append(f"| {title} | {' | '.join(cells)} | {ratio:.2f} |")
    plain, distilled = (results[arm][SECONDS]["mean"] for arm in ("plain", "distilled"))
    lines.append(f"| seconds per step | {plain:.2f} | {distilled:.2f} | {distilled / plain:.2f} |")
    return _TEXT.format(
        **{key: results[key] for key in ("steps", "machine", "torch")}, seeds=seeds, rows="\n".join(lines)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo/transfer"), help="folder for the trainings")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each student")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE override of configs/student-demo.yaml")
    arguments = parser.parse_args()
    main(arguments.out, arguments.seeds, arguments.set)
