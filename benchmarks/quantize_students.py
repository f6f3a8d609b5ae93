"""What int8 costs a student, and what training with rounded values recovers: ``make bench-quantize``.

Students of the demo with a FastViT of five stages, trained from the stored targets alone. Those that differ by
``student.quantize`` share their steps before the last part, so it is trained once per seed. Each finished student is
reparameterised and evaluated three times: in float32, with int8 weights, and with int8 weights and inputs, as torch
computes them (`reinforce.student.layers`). Writes a table into docs/students.md. Finished trainings are kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch

from benchmarks.ablations.encoders import Encoder
from benchmarks.stored import markdown_table, mean_and_spread, replace_part, update_page, write_results
from examples.demo.compare import student_config
from examples.demo.data import write_tests
from reinforce.evaluation.evaluator import Evaluator
from reinforce.processes.signals import StopSignal
from reinforce.shipping.checks import compare_on_sets
from reinforce.shipping.targets.base import reparameterize, split_towers
from reinforce.storage import Storage
from reinforce.student.config import Quantize, StudentConfig
from reinforce.student.layers import quantize
from reinforce.student.train import build, student_job
from reinforce.training.checkpoints import CheckpointFolder
from reinforce.training.loop import run_rank
from reinforce.training.ranks import join_ranks
from teachers.open_clip.teacher import image_spec, load_model
from teachers.open_clip.text import Tokenizer
from teachers.spec import ModelSpec

BUILD = Path("build/quantize")
RESULTS = Path(__file__).parent / "results" / "quantize_students.json"
PAGE = Path(__file__).parents[1] / "docs" / "students.md"
ENCODER = Encoder((1, 1, 1, 1, 1), 16, 64)
SHARE = 0.2
#: Trained with -> overrides; the first has the steps that the others share.
ARMS: Mapping[str, Sequence[str]] = {
    "float32": (),
    "int8-weights": ("student.quantize=int8-weights",),
    "int8": ("student.quantize=int8",),
}
#: Measure -> metric of an evaluation.
MEASURES = {
    "training pictures": "zero_shot/own-style/top1",
    "retrieval, unseen style": "retrieval/unseen-style/text_to_image/r5",
}


def config_of(arm: str, seed: int, out: Path, more: Sequence[str]) -> StudentConfig:
    """The config of a training, which evaluates nothing itself."""
    fixed = (
        *("train.compute.cpus=1", "data.workers=0", "data.streams=4"),
        f"student.model={ENCODER.model(out)}",
    )
    config = student_config("distilled", out / f"{arm}-{seed}", seed, [*fixed, *ARMS[arm], *more])
    assert config.train.steps is not None
    start = config.train.steps - max(1, round(SHARE * config.train.steps))
    checkpoints = config.train.checkpoints.model_copy(update={"every": start, "keep": 2})
    train = config.train.model_copy(update={"checkpoints": checkpoints})
    evaluation = type(config.evaluate)()
    return config.model_copy(update={"train": train, "evaluate": evaluation})


def train(config: StudentConfig) -> None:
    """Train as `reinforce train` does."""
    with join_ranks(config.train.compute, "cpu") as ranks:
        run_rank(partial(build, config), student_job(config), ranks, StopSignal())


def branch(first: StudentConfig, config: StudentConfig) -> None:
    """Let a training begin at the step at which it starts to round, with the state of ``first`` at this step."""
    target = CheckpointFolder(Storage(config.output), 2)
    if target.steps():
        return
    progress, tensors = CheckpointFolder(Storage(first.output), 2).load(first.train.checkpoints.every)
    target.save(replace(progress, fixed_config=student_job(config).fixed_config), tensors)


def evaluate(config: StudentConfig, evaluator: Evaluator) -> dict[str, Any]:
    """Metrics of a finished student in float32 and by the rounding it is for; of a float32 one, by both.

    The result is kept beside the student.
    """
    kept = Path(config.output, "rounded.json")
    if kept.exists():
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    kinds: list[Quantize] = ["int8-weights", "int8"] if config.student.quantize is None else [*config.student.quantize]
    spec = ModelSpec(model=f"local-dir:{config.output}/student")
    found: dict[str, Any] = {}
    clips: dict[str, Any] = {"float32": reparameterize(load_model(spec))}
    for kind in kinds:
        clips[kind] = reparameterize(load_model(spec))
        quantize(clips[kind], kind, in_eval=True)
    image, tokenizer = image_spec(open_clip.get_model_preprocess_cfg(clips["float32"])), Tokenizer(str(spec.model))
    probes = tokenizer(["a dog"])
    runs = {
        kind: {tower.name: tower.module for tower in split_towers(clip, image, probes)} for kind, clip in clips.items()
    }
    for kind in kinds:
        pair = {name: runs[name] for name in ("float32", kind)}
        agreements, metrics = compare_on_sets(evaluator, pair, image, tokenizer)
        for name, values in metrics.items():
            found.setdefault(name, {measure: values[metric] for measure, metric in MEASURES.items()})
        for side, agreement in agreements.items():
            found[kind] |= {f"{side}, mean cosine": agreement.mean, f"{side}, least cosine": agreement.minimum}
    kept.write_text(json.dumps(found), encoding="utf-8")
    return found


def render_page(text: str, results: Mapping[str, Any]) -> str:
    """The page with the table written anew; the rest of ``text`` stays."""
    lines = []
    for arm, seeds in results["students"].items():
        for kind in seeds[0]:
            rows = [seed[kind] for seed in seeds]
            cells = [mean_and_spread([100 * row[measure] for row in rows]) for measure in MEASURES]
            for which in ("mean", "least"):
                key = f"image, {which} cosine"
                cells.append(mean_and_spread([row[key] for row in rows], 4) if key in rows[0] else "1")
            lines.append([arm, kind, *cells])
    heads = ["trained with", "runs in", *(f"{name}, %" for name in MEASURES)]
    table = markdown_table([*heads, "image cosine, mean", "image cosine, least"], lines)
    return replace_part(text, "quantize", table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize_students", description=__doc__)
    parser.add_argument("--out", type=Path, default=BUILD, help="folder for the trainings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the students")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS], help="trained with; float32 is the first")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE override of configs/student-demo.yaml")
    arguments = parser.parse_args()
    write_tests("demo/tests")
    ENCODER.write(arguments.out)
    torch.set_num_threads(1)
    sections = student_config("distilled", arguments.out).evaluate
    evaluator = Evaluator(sections.model_copy(update={"zero_shot": {
        name: section for name, section in sections.zero_shot.items() if f"zero_shot/{name}/top1" in MEASURES.values()
    }}))  # fmt: skip
    students: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arguments.arms}
    for seed in arguments.seeds:
        configs = {arm: config_of(arm, seed, arguments.out, arguments.set) for arm in students}
        first = next(iter(configs.values()))
        for arm, config in configs.items():
            if config is not first:
                branch(first, config)
            train(config)
            students[arm].append(evaluate(config, evaluator))
    results = {"steps": first.train.steps, "share": SHARE, "students": students}
    write_results(RESULTS, ["torch", "timm"], results)
    update_page(PAGE, RESULTS, render_page)
    print(f"written to {RESULTS} and {PAGE}")


if __name__ == "__main__":
    main()
