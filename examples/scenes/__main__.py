"""python -m examples.scenes: students with and without patches by codec and balance, by linear segmentation."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer

import reinforce
from examples.scenes.data import SCENES, SIDE, write_scenes
from reinforce.errors import UserError
from reinforce.student.config import StudentConfig
from reinforce.student.train import build
from teachers.runtime.accelerator import Accelerator

TEACHER = "local-dir:configs/demo-models/conv-64"
#: Codec of the patches and ``loss.dense.balance`` of each arm; ``none`` does not learn its patches.
ARMS = {
    "none": ("float16", "standardise"),
    "float16": ("float16", "standardise"),
    "phi-s": ("float16", "phi-s"),
    **{codec: (codec, "standardise") for codec in ("pca64", "pq64", "pq32")},
}
_BATCHES = 20  # that are read to measure the CPU of loading
_STAGE = 3  # of the student's five: a map of 6 x 6
_METRIC = "segmentation/scenes/miou"
_STUDENT = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": SIDE, "patch_size": None, "width": 16, "layers": [1, 1, 1, 1]},
    "text_cfg": {"context_length": 20, "vocab_size": 3072, "width": 64, "heads": 2, "layers": 1},
}


def main(
    out: Annotated[Path, typer.Option(help="folder for scenes, datasets, students and results.json")] = Path("scenes"),
    scenes: Annotated[int, typer.Option(min=8, help="scenes that students are trained on")] = 1024,
    masks: Annotated[int, typer.Option(min=6, help="scenes with masks that the linear head learns from")] = 384,
    steps: Annotated[int, typer.Option(min=1, help="steps of a training, of 32 crops each")] = 300,
    seeds: Annotated[int, typer.Option(min=1, help="trainings of each arm")] = 3,
    head_steps: Annotated[int, typer.Option(min=1, help="steps of a segmentation head, of 16 crops each")] = 200,
    arms: Annotated[str, typer.Option(help="arms, with commas")] = ",".join(ARMS),
) -> None:
    """Draw scenes, store patches by each codec, train students and print mIoU, bytes and CPU of each arm."""
    classes = write_scenes(out, scenes, masks)
    names = arms.split(",")
    if unknown := [name for name in names if name not in ARMS]:
        raise UserError(f"unknown arm {', '.join(unknown)}; available: {', '.join(ARMS)}.")
    results: dict[str, dict[str, Any]] = {}
    for arm in names:
        dataset = store(out, ARMS[arm][0])
        of_seeds = []
        for seed in range(seeds):
            config = student(out, dataset, arm, seed, steps, classes, head_steps)
            of_seeds.append(reinforce.train(config).metrics[_METRIC])
        results[arm] = {
            "miou": of_seeds,
            "bytes_a_crop": 0 if arm == "none" else bytes_of_crop(Path(dataset)),
            "loading_ms_a_crop": 1000 * loading_seconds(student(out, dataset, arm, 0, steps, classes, head_steps)),
        }
        (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        print(line(arm, results[arm]), flush=True)


def line(arm: str, result: dict[str, Any]) -> str:
    mean, spread = statistics.mean(result["miou"]), statistics.stdev(result["miou"]) if result["miou"][1:] else 0.0
    return (
        f"{arm:8} mIoU {100 * mean:5.2f} +- {100 * spread:.2f} ({len(result['miou'])} seeds), "
        f"{result['bytes_a_crop']:8,.0f} bytes and {result['loading_ms_a_crop']:.2f} ms of CPU a crop"
    )


def store(out: Path, codec: str) -> str:
    """Store the teacher's patches by a codec -> the folder of the dataset."""
    options = {"model": TEACHER, "size": 2 * SIDE}
    patches = {"grid": SIDE // 16, "codec": codec}
    config = {
        "source": str(out / "shard.tar"),
        "output": str(out / f"dataset-{codec}"),
        "augmentations": {"count": 2, "size": SIDE, "scale": [0.6, 1.0], "rand_augment": {"ops": 0, "magnitude": 0}},
        "teachers": {"conv": {"class": "examples.scenes.teacher:Enlarged", "options": options, "patches": patches}},
    }
    reinforce.run(reinforce.Config.model_validate(config))
    return str(config["output"])


def student(out: Path, dataset: str, arm: str, seed: int, steps: int, classes: int, head_steps: int) -> StudentConfig:
    """The training of an arm; all see the teacher's vectors of images, and all but `none` its patches."""
    folder = out / "student"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes(Path("configs/student-demo", name).read_bytes())
    text = _STUDENT["text_cfg"] | {"hf_tokenizer_name": "of this folder"}  # type: ignore[operator]
    preprocess = {"size": SIDE, "mean": 0.5, "std": 0.5, "interpolation": "bicubic", "resize_mode": "shortest"}
    described = {"model_cfg": _STUDENT | {"text_cfg": text}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    dense = {"weight": 1.0, "stage": _STAGE, "balance": ARMS[arm][1]}
    masks = {
        "images": str(out / SCENES),
        "classes": classes,
        "stage": _STAGE,
        "steps": head_steps,
        "learning_rate": 0.01,
    }
    return StudentConfig.model_validate(
        {
            "output": str(out / "students" / f"{arm}-{seed}"),
            "seed": seed,
            "student": {"model": f"local-dir:{folder}"},
            "data": {"datasets": dataset, "captions": "none", "workers": 0},
            "loss": {"features": "all", **({} if arm == "none" else {"dense": dense})},
            "train": {"steps": steps, "batch": 32, "optimizer": {"lr": 2e-3, "warmup": steps // 10}, "log_every": 50},
            "evaluate": {"segmentation": {"scenes": masks}},
        }
    )


def bytes_of_crop(dataset: Path) -> float:
    """Bytes of the files of patches for each stored crop."""
    files = [*(dataset / "patches").rglob("*.parquet")]
    samples = sum(1 for _ in reinforce.open(str(dataset)))
    return sum(file.stat().st_size for file in files) / (2 * samples)


def loading_seconds(config: StudentConfig) -> float:
    """Seconds of CPU that reading a crop with its targets takes."""
    _, feed = build(config, Accelerator("cpu"))
    batches = feed.batches(0, 1, 32, 0)
    next(batches)
    start = time.process_time()
    for _ in itertools.islice(batches, _BATCHES):
        pass
    seconds = time.process_time() - start
    batches.close()
    return seconds / (32 * _BATCHES)


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
