"""Does a student learn from stored embeddings what its own pictures cannot teach? ``make bench-transfer``.

The two students of `make demo`, each from several seeds, which decide its first weights and the order of the samples.
Reads demo/dataset and demo/tests, so run `make demo` first; goes on where it was when it is started again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from reinforce.demo.compare import ARMS, MEASURES, SECONDS, measures, print_table, student_config
from reinforce.student.train import train

RESULTS = Path(__file__).parent / "results" / "transfer.json"


def main(out: Path, seeds: int, changes: Sequence[str]) -> None:
    """Train ``seeds`` students of each arm, with ``changes`` of their config, print the table and write it down."""
    rows: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    steps = 0
    for seed in range(seeds):
        for arm in ARMS:
            results = train(student_config(arm, out / f"{arm}-{seed}", seed, changes))
            rows[arm].append(measures(results))
            steps = results.steps
    print_table(f"{seeds} seeds after {steps:,} steps: the mean (from the lowest to the highest)", rows)
    for name in ("unseen_style", "unseen_pictures"):
        plain, distilled = (statistics.fmean(row[name] for row in rows[arm]) for arm in ("plain", "distilled"))
        print(f"{MEASURES[name][0]}: distilled is {distilled / max(plain, 1e-9):.2f} times plain")
    RESULTS.write_text(json.dumps(summary(rows, steps), indent=2) + "\n", encoding="utf-8")
    print(f"written to {RESULTS}")


def summary(rows: Mapping[str, Sequence[Mapping[str, float]]], steps: int) -> dict[str, object]:
    """What is written: mean, lowest and highest of each measure, and where it was measured."""
    found: dict[str, object] = {"steps": steps, "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    found["torch"] = torch.__version__
    for arm, seeds in rows.items():
        values = {name: [row[name] for row in seeds] for name in (*MEASURES, SECONDS)}
        found[arm] = {
            name: {"mean": statistics.fmean(v), "min": min(v), "max": max(v), "seeds": v} for name, v in values.items()
        }
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo/transfer"), help="folder for the trainings")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of configs/student-demo.yaml")
    arguments = parser.parse_args()
    main(arguments.out, arguments.seeds, arguments.set)
