"""Does a student learn from the stored embeddings what its own pictures cannot teach? ``make bench-transfer``.

One small CLIP teacher is trained on 1,300 emoji in two hands, Twemoji's and OpenMoji's. A run stores what it sees in
the Twemoji pictures. Students then train on those alone, plainly (lambda 0) or from the stored embeddings (lambda 1),
for equal steps from equal starts, and are asked to name the OpenMoji pictures, a style none of them has seen. All of
it goes through `reinforce run` and `reinforce train`, so it goes on where it was when it is started again.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import reinforce
from reinforce.demo.data import write_concepts

RESULTS = Path(__file__).parent / "results" / "transfer.json"
ARMS = {"plain": 0.0, "distilled": 1.0}
TEMPLATES = ["{}", "a {}", "an emoji of a {}"]
AUGMENTATIONS = {"size": 64, "scale": [0.4, 1.0], "rand_augment": {"ops": 2, "magnitude": 9}}
PREPROCESSING = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}


def model_folder(path: Path, width: int, dim: int, text_width: int) -> str:
    """An open_clip folder without weights: a convolutional CLIP for 64 pixels, which a training starts at random."""
    config = {
        "model_cfg": {
            "embed_dim": dim,
            "vision_cfg": {"image_size": 64, "patch_size": None, "width": width, "layers": [1, 1, 1, 1]},
            "text_cfg": {
                "context_length": 32,
                "vocab_size": 49408,
                "width": text_width,
                "heads": text_width // 32,
                "layers": 2,
            },
        },
        "preprocess_cfg": {"size": 64, **PREPROCESSING},
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / "open_clip_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return f"local-dir:{path}"


def training(
    output: Path, model: str, dataset: Path, share: float, seed: int, steps: int, batch: int, sets: Mapping[str, Path]
) -> dict[str, Any]:
    """A training's config; ``sets`` are shards with ``class`` and ``group`` in their sidecars."""
    zero_shot = {
        name: {
            "images": f"{path}/*.tar",
            "label": "json:class",
            "groups": "json:group",
            "templates": TEMPLATES,
        }
        for name, path in sets.items()
    }
    return {
        "output": str(output),
        "seed": seed,
        "student": {"model": model},
        "data": {"datasets": str(dataset), "captioners": [], "workers": 1, "window": 1024},
        "loss": {"lambda": share},
        "train": {
            "steps": steps,
            "batch": batch,
            "optimizer": {"lr": 2e-3, "warmup": min(100, steps // 5), "weight_decay": 0.1},
            "compute": {"cpus": torch.get_num_threads()},
            "checkpoints": {"every": 100, "keep": 1},
        },
        "evaluate": {"zero_shot": zero_shot},
    }


def main(out: Path, seeds: int, teacher_steps: int, steps: int, batch: int) -> None:
    styles = {style: out / "shards" / style for style in ("twemoji", "openmoji")}
    for style, folder in styles.items():
        write_concepts(folder, style)
    both = [f"{folder}/*.tar" for folder in styles.values()]
    samples = {"source": both, "output": str(out / "samples"), "augmentations": {**AUGMENTATIONS, "count": 30}}
    finished(reinforce.run(samples))
    teacher = reinforce.train(
        training(
            out / "teacher",
            model_folder(out / "models" / "teacher", width=32, dim=128, text_width=128),
            out / "samples",
            share=0.0,
            seed=0,
            steps=teacher_steps,
            batch=batch,
            sets=styles,
        )
    )
    finished(
        reinforce.run(
            {
                "source": f"{styles['twemoji']}/*.tar",
                "output": str(out / "dataset"),
                "augmentations": {**AUGMENTATIONS, "count": 10},
                "teachers": {"small": {"model": f"local-dir:{out / 'teacher' / 'student'}"}},
                "workers": {"cpus": torch.get_num_threads()},
            }
        )
    )
    model = model_folder(out / "models" / "student", width=16, dim=128, text_width=128)
    students: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in range(seeds):
        for arm, share in ARMS.items():
            output = out / "students" / f"{arm}-{seed}"
            done = reinforce.train(
                training(output, model, out / "dataset", share, seed, steps=steps, batch=batch, sets=styles)
            )
            students[arm].append({**done.metrics, "seconds_per_step": done.seconds_per_step})
    report(dict(teacher.metrics), students, {"teacher_steps": teacher_steps, "steps": steps, "batch": batch})


def finished(summary: Any) -> None:
    if summary.status:
        raise SystemExit(summary.text())


def report(
    teacher: Mapping[str, float], students: Mapping[str, Sequence[Mapping[str, float]]], setting: Mapping[str, int]
) -> None:
    """Print the table and write it down."""
    table = Table(title=f"zero-shot accuracy, mean (and spread) of {len(students['plain'])} seeds")
    columns = {
        "own style": "zero_shot/twemoji/top1",
        "unseen style": "zero_shot/openmoji/top1",
        "unseen style, subgroup": "zero_shot/openmoji/group",
    }
    for column in ("", *columns, "s a step"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("teacher (saw both)", *(f"{teacher[name]:.1%}" for name in columns.values()), "")
    summary: dict[str, dict[str, Any]] = {}
    for arm, results in students.items():
        values = {name: [result[name] for result in results] for name in (*columns.values(), "seconds_per_step")}
        summary[arm] = {
            name: {"mean": statistics.fmean(v), "min": min(v), "max": max(v), "seeds": v} for name, v in values.items()
        }
        cells = [
            f"{entry['mean']:.1%} ({entry['min']:.1%} to {entry['max']:.1%})"
            for entry in (summary[arm][name] for name in columns.values())
        ]
        table.add_row(f"student, {arm}", *cells, f"{summary[arm]['seconds_per_step']['mean']:.2f}")
    Console().print(table)
    machine = {"threads": torch.get_num_threads(), "machine": platform.machine(), "torch": torch.__version__}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"setting": {**setting, **machine}, "teacher": teacher, **summary}, indent=2) + "\n")
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo/transfer"), help="folder for data, models, trainings")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=192)
    arguments = parser.parse_args()
    main(arguments.out, arguments.seeds, arguments.teacher_steps, arguments.steps, arguments.batch)
