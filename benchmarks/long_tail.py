"""The third part of ``make bench-select``: what students gain by a balanced view of data with a long tail.

The pictures of the demo's teachers in nine styles, without OpenMoji: of the n-th of 1,364 concepts as many as
60 / (1 + n / 10), and at least one, in styles by a power law, some of them twice. Plain and distilled students of equal
steps are trained on all samples, and on as many samples as there are concepts: at random, with the captions that fit
best, and of clusters of images, balanced. *Rare* are the concepts of the second half, with one picture each. Finished
trainings are kept, so that an interrupted benchmark continues. Writes a table into docs/choosing.md.
"""

from __future__ import annotations

import argparse
import json
import random
import tarfile
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import reinforce
from benchmarks.stored import markdown_table, mean_and_spread, replace_part, update_page, write_results, write_tar
from examples.demo.compare import arm_overrides
from examples.demo.data import CLASSES, UNSEEN_STYLE, shared_concepts, write_shards, write_tests
from examples.demo.students import train_side_by_side
from examples.demo.teacher_data import ICON_SETS, write_teacher_data
from reinforce.explore.config import SelectConfig
from reinforce.explore.select import select
from reinforce.storage import Storage
from reinforce.training.results import read_results

RESULTS = Path(__file__).parent / "results" / "long_tail.json"
PAGE = Path(__file__).parents[1] / "docs" / "choosing.md"
BUILD = Path("build/long-tail")
STYLES = ("twemoji", *ICON_SETS)
SCORE, TEACHER = "scores.match.caption_mean", "conv-64"
#: Arm -> the rule of its view.
RULES: dict[str, Any] = {
    "all": None,
    "random": {"sample": 1364},
    "best captions": {"keep": {"top": 1364, "by": SCORE}},
    "balanced": {"balance": {"teacher": TEACHER, "clusters": [1000], "keep": 1364}},
}
KINDS = ("plain", "distilled")
#: Column -> metric.
COLUMNS = {
    "training pictures": "zero_shot/own-style/top1",
    "rare ones": "zero_shot/rare/top1",
    "unseen style": "zero_shot/unseen-style/top1",
    "rare ones of it": "zero_shot/rare-unseen/top1",
    "retrieval": "retrieval/unseen-style/text_to_image/r5",
}
_TEXT = """\
Students of the demo on {samples:,} pictures of 1,364 concepts in nine styles with a long tail, {steps} steps each, \
mean and standard deviation of {seeds} seeds ({date}, [long_tail.json](../benchmarks/results/long_tail.json)). The \
largest concept has 60 pictures, half of the concepts, the *rare* ones, one each. Views have 1,364 samples, so that \
each is seen {times:.1f} times as often; the balanced one is `balance: {{teacher: {teacher}, clusters: [1000], keep: \
1364}}`. Top-1 accuracy among all names, and recall at 5 of retrieval, in %."""


def read_pictures(folder: Path) -> dict[str, dict[str, bytes]]:
    """Contents of the samples of tars, by key and ending."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, ending = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                found.setdefault(key, {})[ending] = file.read()
    return found


def class_of(sample: Mapping[str, bytes]) -> str:
    return str(json.loads(sample["json"])["class"])


def write_data() -> list[str]:
    """Write the shards with a long tail, and test sets of rare concepts -> these concepts."""
    write_teacher_data("demo/teacher-data", "demo/npm")
    write_shards("demo/shards")
    write_tests("demo/tests")
    rng = random.Random(0)  # noqa: S311 (not for security)
    concepts = sorted({concept.name for concept in shared_concepts()})
    rng.shuffle(concepts)
    by_concept: dict[str, dict[str, dict[str, bytes]]] = {}
    for style in STYLES:
        for sample in read_pictures(Path("demo/teacher-data") / style).values():
            by_concept.setdefault(class_of(sample), {})[style] = sample
    samples = []
    for number, concept in enumerate(concepts):
        there = [style for style in STYLES if style in by_concept[concept]]
        weights = [1 / (1 + STYLES.index(style)) for style in there]
        count = max(1, round(60 / (1 + number / 10)))
        samples += [by_concept[concept][style] for style in rng.choices(there, weights, k=count)]
    rng.shuffle(samples)
    (BUILD / "shards").mkdir(parents=True, exist_ok=True)
    for shard in range(4):
        numbered = [(f"{number:06d}", samples[number]) for number in range(shard, len(samples), 4)]
        write_tar(BUILD / "shards" / f"{shard:05d}.tar", numbered)
    rare = concepts[len(concepts) // 2 :]
    for name, folder in (("rare", Path("demo/shards")), ("rare-unseen", Path("demo/tests") / UNSEEN_STYLE)):
        (BUILD / name).mkdir(exist_ok=True)
        of_set = [(key, sample) for key, sample in read_pictures(folder).items() if class_of(sample) in {*rare}]
        write_tar(BUILD / name / "00000.tar", of_set)
    return rare


def make_views(rare: list[str]) -> dict[str, dict[str, int]]:
    """Reinforce the shards and write the views -> samples, concepts and rare concepts of each."""
    config = yaml.safe_load(Path("configs/demo.yaml").read_text())
    config |= {"source": f"{BUILD}/shards/*.tar", "output": str(BUILD / "dataset")}
    config["augmentations"]["count"] = 5
    config["scores"] = {"match": {"similarity": [*config["teachers"]]}}
    summary = reinforce.run(config)
    if summary.status:
        raise SystemExit(summary.message)
    found = {}
    for arm, rule in RULES.items():
        view = None
        if rule is not None:
            view = arm.replace(" ", "-")
            select(SelectConfig.model_validate({"dataset": config["output"], "name": view, "rules": [rule]}))
        kept = reinforce.open(config["output"], view=view, teachers=[], captioners=[])
        names = [str((sample.metadata or {})["class"]) for sample in kept]
        counts = {"samples": len(names), "concepts": len({*names}), "rare": len({*names} & {*rare})}
        found[arm] = counts
    return found


def train(seeds: int) -> dict[str, dict[str, list[float]]]:
    """Train the students that are not trained yet -> the values of the columns by kind and arm, and the steps."""
    sets = {
        name: {"images": f"{BUILD}/{name}/*.tar", "classes": f"demo/tests/{CLASSES}", "label": "json:class"}
        for name in ("rare", "rare-unseen")
    }
    templates = ["{}", "a {}", "an emoji of a {}"]
    more = [f"evaluate.zero_shot.{name}={json.dumps({**of, 'templates': templates})}" for name, of in sets.items()]
    trainings = {}
    for seed in range(seeds):
        for kind in KINDS:
            for arm in RULES:
                name, view = f"{kind}-{arm.replace(' ', '-')}-{seed}", arm.replace(" ", "-")
                data = {"url": str(BUILD / "dataset"), **({} if arm == "all" else {"view": view})}
                where = BUILD / "students" / name
                trainings[name] = [*arm_overrides(kind, where, seed), f"data.datasets=[{json.dumps(data)}]", *more]
    train_side_by_side(trainings, BUILD / "students")
    found: dict[str, dict[str, list[float]]] = {}
    for name in trainings:
        results = read_results(Storage(str(BUILD / "students" / name)))
        assert results is not None
        values = found.setdefault(name.rpartition("-")[0], {})
        for column, metric in COLUMNS.items():
            values.setdefault(column, []).append(100 * float(results.metrics[metric] or 0))
        values.setdefault("steps", []).append(results.steps)
    return found


def render_page(text: str, results: Mapping[str, Any]) -> str:
    """The page with the part about the long tail written anew; the rest of ``text`` stays."""
    students, views = results["students"], results["views"]
    seeds, steps = len(next(iter(students.values()))["steps"]), next(iter(students.values()))["steps"][0]
    samples = views["all"]["samples"]
    times = samples / views["balanced"]["samples"]
    about = _TEXT.format(samples=samples, steps=f"{steps:.0f}", seeds=seeds, times=times, teacher=TEACHER, **results)
    rows = [
        [kind, arm, f"{views[arm]['concepts']:,}", f"{views[arm]['rare']:,}"]
        + [mean_and_spread(students[f"{kind}-{arm.replace(' ', '-')}"][column]) for column in COLUMNS]
        for kind in KINDS
        for arm in RULES
    ]
    table = markdown_table(["students", "trained on", "concepts", "rare", *COLUMNS], rows)
    return replace_part(text, "long-tail", f"{textwrap.fill(about, 120)}\n\n{table}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_tail", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each student")
    seeds = parser.parse_args().seeds
    views = make_views(write_data())
    print(views, flush=True)
    write_results(RESULTS, ["torch", "numpy", "faiss-cpu"], {"views": views, "students": train(seeds)})
    update_page(PAGE, RESULTS, render_page)
    print(f"written to {RESULTS} and {PAGE}")


if __name__ == "__main__":
    main()
