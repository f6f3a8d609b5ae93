"""The second part of ``make bench-select``: what a student gains by a view of a dataset with wrong captions.

Plain students of the demo (lambda 0, true captions alone), with equal steps and several seeds, on all samples of the
dataset in which 40 % of the captions are exchanged, on the view that keeps the best 60 % by the ensemble's similarity,
and on the pairs that are right, which no rule can know. Finished trainings are kept, so that an interrupted benchmark
continues. Writes a table into docs/choosing.md.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import reinforce
from benchmarks.selection import BUILD, auc, captions, make_dataset, worst
from benchmarks.stored import markdown_table, replace_part, update_page, write_results
from benchmarks.transfer import summarise
from examples.demo.compare import MEASURES, arm_overrides, collect_measures, format_share
from examples.demo.data import SHARE, write_tests
from examples.demo.students import train_side_by_side
from reinforce.explore.config import SelectConfig
from reinforce.explore.select import select

RESULTS = Path(__file__).parent / "results" / "view_students.json"
PAGE = Path(__file__).parents[1] / "docs" / "choosing.md"
SCORE = "scores.ensemble.caption_mean"
#: Arm -> what its students are trained on.
ARMS = {"whole": "all samples", "view": f"best {1 - SHARE:.0%}", "right": "right pairs alone"}
SHOWN = ("unseen_style", "unseen_style_group", "unseen_pictures_group", "retrieval", "own_style")
_TEXT = """\
Plain students of the demo on the same dataset, {steps} steps each, mean and minimum to maximum of {seeds} seeds \
({date}, [view_students.json](../benchmarks/results/view_students.json)). The view is \
`keep: {{top: {top:g}, by: {score}}}`: it leaves out {left_out:,} of {samples:,} samples, of \
which {precision:.1%} have a wrong caption (precision); these are {recall:.1%} of the wrong captions (recall). \
*Recovered* is the share that the view regains of what the students on all samples lose against those on the right \
pairs alone; it is "-" where not each of their seeds is better."""
_AGREEMENT = """\
The agreement of true and synthetic captions, the mean cosine of the three teachers' embeddings of these texts, finds \
wrong captions with an AUC of {alone[AUC]:.3f} ({alone[wrong of worst]:.1%} of the worst 40 % are wrong), less well \
than images do. Half of it added to `caption_mean` gives {added[AUC]:.3f} ({added[wrong of worst]:.1%})."""


def make_views(url: str) -> dict[str, float]:
    """Write the views of the arms -> how well the one by scores finds the wrong captions."""
    right = captions(Path("demo/shards"))
    samples = list(reinforce.open(url, teachers=[], captioners=[]))
    wrong = {sample.key for sample in samples if sample.caption != right[sample.key]}
    keys = ", ".join(f"'{sample.key}'" for sample in samples if sample.key not in wrong)
    rules = {"view": {"keep": {"top": 1 - SHARE, "by": SCORE}}, "right": {"where": f"key IN ({keys})"}}
    for name, rule in rules.items():
        select(SelectConfig.model_validate({"dataset": url, "name": name, "rules": [rule]}))
    kept = {sample.key for sample in reinforce.open(url, view="view", teachers=[], captioners=[])}
    left_out = {sample.key for sample in samples} - kept
    found = len(left_out & wrong)
    return {
        "samples": len(samples),
        "left_out": len(left_out),
        "precision": found / len(left_out),
        "recall": found / len(wrong),
    }


def judge_agreement(url: str) -> dict[str, dict[str, float]]:
    """How well the agreement of true and synthetic captions finds wrong ones, alone and added to the similarity."""
    right, samples = captions(Path("demo/shards")), list(reinforce.open(url))
    wrong = np.array([sample.caption != right[sample.key] for sample in samples])
    pairs = [[(one["caption"], one["coca"]) for one in sample.texts.values()] for sample in samples]
    alone = np.array([np.mean([(a.astype(np.float32) @ b.astype(np.float32).T).mean() for a, b in of]) for of in pairs])
    similarity = np.array([sample.values["scores/ensemble"]["caption_mean"] for sample in samples])
    scores = {"alone": alone, "added": similarity + alone / 2}
    return {name: {"AUC": auc(of, wrong), "wrong of worst": worst(of, wrong)} for name, of in scores.items()}


def train(url: str, out: Path, seeds: int, more: Sequence[str]) -> tuple[dict[str, Any], int]:
    """Train the students that are not trained yet -> the summary of each arm, and the steps."""
    data = {arm: f"{{url: {url}{'' if arm == 'whole' else f', view: {arm}'}}}" for arm in ARMS}
    trainings = {
        f"{arm}-{seed}": [*arm_overrides("plain", out / f"{arm}-{seed}", seed), f"data.datasets=[{data[arm]}]", *more]
        for seed in range(seeds)
        for arm in ARMS
    }
    train_side_by_side(trainings, out)
    rows, steps = collect_measures({arm: [out / f"{arm}-{seed}" for seed in range(seeds)] for arm in ARMS})
    return summarise(rows), steps


def recovered(students: Mapping[str, Any], measure: str) -> str:
    """The share of the loss that the view regains, by means, where each seed shows a loss."""
    whole, view, right = (students[arm][measure] for arm in ARMS)
    if right["min"] <= whole["max"]:
        return "-"
    return f"{(view['mean'] - whole['mean']) / (right['mean'] - whole['mean']):.0%}"


def render_page(text: str, results: Mapping[str, Any]) -> str:
    """The page with the part about students written anew; the rest of ``text`` stays."""
    students = results["students"]
    seeds = len(students["whole"][SHOWN[0]]["seeds"])
    rows = [
        [MEASURES[name][0], *(format_share(students[arm][name]["seeds"]) for arm in ARMS), recovered(students, name)]
        for name in SHOWN
    ]
    parts = [
        textwrap.fill(_TEXT.format(**results["view"], **results, seeds=seeds, top=1 - SHARE, score=SCORE), 120),
        markdown_table(["trained on", *ARMS.values(), "recovered"], rows),
        textwrap.fill(_AGREEMENT.format(**results["agreement"]), 120),
    ]
    return replace_part(text, "students", "\n\n".join(parts))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.view_students", description=__doc__)
    parser.add_argument("--out", type=Path, default=BUILD / "students", help="folder for the trainings")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each student")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE override of configs/student-demo.yaml")
    arguments = parser.parse_args()
    write_tests("demo/tests")
    url = make_dataset()
    view, agreement = make_views(url), judge_agreement(url)
    students, steps = train(url, arguments.out, arguments.seeds, arguments.set)
    results = {"view": view, "agreement": agreement, "steps": steps, "students": students}
    write_results(RESULTS, ["torch", "numpy"], results)
    update_page(PAGE, RESULTS, render_page)
    print(f"written to {RESULTS} and {PAGE}")


if __name__ == "__main__":
    main()
