"""``make bench-transfer``: does a student learn from stored embeddings what its own pictures cannot teach?

Trains the students of `make demo` with several seeds, which determine the initial weights and the sample order.
Reads the datasets and tests of the demo, so run `make demo` first. An interrupted benchmark resumes. Writes
a section of docs/ablations.md, docs/transfer.png and benchmarks/results/transfer.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.stored import markdown_table, replace_part, update_page
from examples.demo.compare import (
    ARMS,
    MEASURES,
    PAIRS,
    SECONDS,
    arm_overrides,
    collect_measures,
    draw_summary,
    format_share,
    print_table,
    ratio,
    student_config,
)
from examples.demo.students import train_side_by_side
from reinforce.shipping.latency import machine_name

RESULTS = Path(__file__).parent / "results" / "transfer.json"
PAGE = Path(__file__).parents[1] / "docs" / "ablations.md"
PICTURE = PAGE.with_name("transfer.png")
_TEXT = """\
## What a student learns from stored embeddings

The demo's students are trained for {steps} steps from the same initial weights, with {seeds} seeds each, on Twemoji
pictures only. The plain student uses the pictures and their captions (lambda 0). The distilled student uses everything
in the reinforced dataset: the teachers' embeddings, by similarities and as features (lambda {lambda_}), and synthetic
captions.

```console
make demo               # makes the datasets and one student of each kind
make bench-transfer     # trains {seeds} seeds of each; writes this section and benchmarks/results/transfer.json
```

![Accuracy of plain and distilled students on four tests, with right and with wrong captions](transfer.png)

Mean, with minimum to maximum over the seeds ({machine}, torch {torch}).

{tables}

The accuracies are top-1 accuracies of zero-shot classification among all 1,364 names; chance is 0.1 %.

- *unseen style*: OpenMoji pictures of about three quarters of the concepts. The teachers were trained on them, the
  students were not. What the distilled student gains over the plain one comes only from stored embeddings of Twemoji
  pictures, so this measures transfer.
- *unseen pictures*: OpenMoji pictures of the other concepts, on which no teacher was trained either. This is the
  harder test and measures generalization.
- *unseen icons*: black symbols of two icon fonts, Material Design Icons and Font Awesome, drawn for user interfaces.
  No model was trained on any of them.
- *subgroup*: the predicted concept is in the right one of Unicode's subgroups, such as food-fruit.
- *retrieval, unseen style*: the right picture is among the five nearest to a caption.
- *training pictures*: the Twemoji pictures on which the students were trained, which memorising solves.

With wrong captions, 40 % of the samples have the caption of another sample, the same samples with every seed. The
dataset is made from these shards, so the teachers embed the wrong captions; the captioner only sees the pictures. It
stores 5 augmentations of each picture instead of 10.

The tests were chosen before the recipe was tuned, and the tuning looked at none of them: `configs/tune-demo.yaml`
holds out Twemoji pictures of its own. The accuracy of the teachers is in
[their model card](../configs/demo-models/README.md).
"""


def main(out: Path, seeds: int, more: Sequence[str]) -> None:
    """Train ``seeds`` students of each arm with ``more`` overrides; print and write the results."""
    folders = {arm: [out / f"{arm}-{seed}" for seed in range(seeds)] for arm in ARMS}
    train_side_by_side(
        {
            folders[arm][seed].name: [*arm_overrides(arm, folders[arm][seed], seed), *more]
            for seed in range(seeds)
            for arm in ARMS
        },
        out,
    )
    rows, steps = collect_measures(folders)
    print_table(f"{seeds} seeds after {steps:,} steps: mean (minimum to maximum)", rows)
    results = {**summarise(rows), "steps": steps, "lambda": student_config("distilled", out, 0, more).loss.lambda_}
    results |= {"machine": machine_name(), "torch": torch.__version__}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    update_page(PAGE, RESULTS, render_page)
    draw_summary(rows, str(PICTURE))
    print(f"written to {RESULTS}, {PAGE} and {PICTURE}")


def summarise(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Return mean, minimum, maximum and all seeds of each measure of each arm."""
    results: dict[str, Any] = {}
    for arm, seeds in rows.items():
        values = {name: [row[name] for row in seeds] for name in (*MEASURES, SECONDS)}
        results[arm] = {
            name: {"mean": statistics.fmean(v), "min": min(v), "max": max(v), "seeds": v} for name, v in values.items()
        }
    return results


def render_page(text: str, results: Mapping[str, Any]) -> str:
    """The page with the section written anew; the rest of ``text`` stays."""
    tables = [_table(captions, results, *arms) for captions, arms in PAIRS.items()]
    section = _TEXT.format(
        **{key: results[key] for key in ("steps", "machine", "torch")},
        lambda_=f"{results['lambda']:g}",
        seeds=len(results["plain"][SECONDS]["seeds"]),
        tables="\n\n".join(tables),
    )
    return replace_part(text, "transfer", section)


def _table(captions: str, results: Mapping[str, Any], plain: str, distilled: str) -> str:
    rows = []
    for name, (title, _) in MEASURES.items():
        values = [results[arm][name]["seeds"] for arm in (plain, distilled)]
        rows.append([title, *map(format_share, values), f"{ratio(*values):.2f}"])
    one, other = (results[arm][SECONDS]["mean"] for arm in (plain, distilled))
    rows.append(["seconds per step", f"{one:.2f}", f"{other:.2f}", f"{other / one:.2f}"])
    return markdown_table([captions, "plain", "distilled", "times"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo/transfer"), help="folder for the trainings")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each student")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE override of configs/student-demo.yaml")
    arguments = parser.parse_args()
    main(arguments.out, arguments.seeds, arguments.set)
