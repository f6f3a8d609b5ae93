"""python -m drills.rehearsal: run the steps of docs/recipes.md with small stand-ins, in about two minutes."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drills.rehearsal.stand_ins import CLASSIFICATION, TABLES, write_stand_ins

ROOT = Path(__file__).parents[2]
#: Runs a command of ``reinforce`` in the root of the repository. Raises an error if it fails.
Run = Callable[[list[str]], object]


def rehearse(folder: Path, run: Run, samples: int = 96, steps: int = 120) -> dict[str, float]:
    """Run each step with stand-ins below ``folder`` -> main metrics of the student by set."""
    write_stand_ins(folder, samples)
    labels = _set(
        source=f"{folder}/images/00000000.tar",
        reinforcements=f"{folder}/labels/00000000.tar",
        output=f"{folder}/dataset",
        **{"augmentations.count": 3, "workers.cpus": 1},
    )
    training = _set(
        output=f"{folder}/training",
        **{
            "student.model": f"local-dir:{folder}/student",
            "data.datasets": f"{folder}/dataset",
            "data.streams": 1,
            "data.workers": 0,
            "train.steps": steps,
            "train.batch": 48,
            "train.optimizer.warmup": steps // 10,
            "train.compute": "{ranks: 1, gpus: 0, cpus: 1}",
            "train.checkpoints.every": steps,
            "train.log_every": steps // 2,
            "evaluate": "{}",
        },
    )
    recipe = "configs/recipes/mobileclip-b-dfndr12m.yaml"
    sets = ",".join([*CLASSIFICATION, *TABLES])
    out = folder / "evaluation"
    run(["plan", "configs/dfndr12m.yaml", *labels])
    run(["run", "configs/dfndr12m.yaml", *labels])
    run(["status", f"{folder}/dataset"])
    run(["train", recipe, *training])
    evaluation = ["--suite", "datacomp", "--data", f"{folder}/evalsets", "--sets", sets, "--out", str(out)]
    run(["evaluate", f"{folder}/training", *evaluation, "--compare", "mobileclip2_b"])
    return _main_metrics(out)


def _set(**changes: Any) -> list[str]:
    return [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]


def _main_metrics(out: Path) -> dict[str, float]:
    [results] = out.glob("*.jsonl")
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    return {line["key"]: line["metrics"]["main_metric"] for line in lines}


def _command(words: list[str]) -> None:
    print(f"\n$ reinforce {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "reinforce", *words], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder, which is removed")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary:
        metrics = rehearse(folder or Path(temporary), _command)
    described = ", ".join(f"{key} {value:.2f}" for key, value in metrics.items())
    print(f"\nmain metrics of the stand-in student: {described}")


if __name__ == "__main__":
    main()
