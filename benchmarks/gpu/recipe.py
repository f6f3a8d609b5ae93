"""Configs of the measurements: those of ``configs/``, with the models, the shards and the sizes of the benchmark."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from benchmarks.gpu.bench import Bench
from benchmarks.pipeline.inputs import photo, write_shards
from reinforce import settings
from reinforce.config import Config, parse_config
from reinforce.student.config import StudentConfig
from teachers.spec import CaptionerSpec, TeacherSpec

CONFIGS = Path(__file__).parents[2] / "configs"
_RUN, _TRAINING, _DEMO = (CONFIGS / name for name in ("dfn5b.yaml", "mobileclip2-s0.yaml", "demo.yaml"))
#: A model with a larger tower than those of the recipe.
FURTHER = "ViT-SO400M-14-SigLIP"
_PHOTOS = 8
_TRAINED = "conv-48"  # of the demo's teachers the one whose embeddings change least when they are rounded


def source(bench: Bench) -> str:
    """URL of shards of photographs, which are written once."""
    folder = bench.folder / "source"
    if not folder.exists():
        photos = [photo(seed) for seed in range(_PHOTOS)]
        write_shards(folder.with_name("writing"), bench.size.shards, bench.size.images, photos)
        folder.with_name("writing").rename(folder)
    return f"{folder}/*.tar"


def run_config(bench: Bench, output: Path, augmentations: int = 2, accelerator: str = "fast") -> Config:
    """The config of configs/dfn5b.yaml."""
    config: dict[str, Any] = yaml.safe_load(_RUN.read_text(encoding="utf-8"))
    config |= {"source": source(bench), "output": str(output), "accelerator": accelerator}
    config["augmentations"]["count"] = augmentations
    workers = {"max": 1, "gpus": int(bench.on_cuda), "cpus": bench.cores, "batch": bench.size.batch}
    config["workers"] = workers
    for spec in (*config["teachers"].values(), *config["captioners"].values()):
        spec["model"] = bench.model(spec["model"])
        del spec["pretrained"]
    if bench.size.tiny:
        for spec in config["captioners"].values():
            spec.update(captions=2, max_length=8)
    return parse_config(config)


def demo() -> Config:
    """The config of configs/demo.yaml with one teacher, in the precision of runs on accelerators."""
    config: dict[str, Any] = yaml.safe_load(_DEMO.read_text(encoding="utf-8"))
    config["teachers"] = {_TRAINED: config["teachers"][_TRAINED]}
    for spec in (*config["teachers"].values(), *config["captioners"].values()):
        folder = CONFIGS.parent / spec["model"].removeprefix("local-dir:")
        spec |= {"model": f"local-dir:{folder}", "precision": "bf16"}
    return parse_config(config)


def model_names() -> list[str]:
    """Names of the models that are measured, of which ``--weights`` may have folders."""
    config: dict[str, Any] = yaml.safe_load(_RUN.read_text(encoding="utf-8"))
    return [spec["model"] for spec in (*config["teachers"].values(), *config["captioners"].values())] + [FURTHER]


def teachers(bench: Bench) -> dict[str, TeacherSpec]:
    """The teachers of the recipe, by name."""
    return dict(run_config(bench, bench.folder).teachers)


def captioner(bench: Bench) -> tuple[str, CaptionerSpec]:
    """The captioner of the recipe, with its name."""
    ((name, spec),) = run_config(bench, bench.folder).captioners.items()
    return name, spec


def changed(spec: Any, **keys: Any) -> Any:
    """A spec with other values of some keys, checked as those of a config; None removes a key."""
    values = {**spec.model_dump(exclude_unset=True, by_alias=True), **keys}
    return type(spec).model_validate({key: value for key, value in values.items() if value is not None})


def available(spec: Any, switches: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The spec with each set of keys, by its name; without those that its family does not have."""
    for name, keys in switches.items():
        with contextlib.suppress(ValidationError):
            yield name, changed(spec, **keys)


def training_config(
    bench: Bench, model: str, dataset: Path, output: Path, data: Mapping[str, Any] | None = None, **train: Any
) -> StudentConfig:
    """The config of configs/mobileclip2-s0.yaml with a batch for one rank. ``data`` and ``train`` have keys of these
    parts, among them those of ``compute``, that are to be changed."""
    config: dict[str, Any] = yaml.safe_load(_TRAINING.read_text(encoding="utf-8"))
    size, ranks = bench.size, bench.ranks if train.pop("all_ranks", False) else 1
    compute = {
        "precision": "bf16" if bench.on_cuda else "fp32",
        "gpus": int(bench.on_cuda),
        "cpus": bench.cores,
        "accumulate": "auto",
        **train.pop("compute", {}),
    }
    config["train"] |= {"batch": size.samples * ranks, "log_every": 2, **train, "compute": compute}
    config["train"]["optimizer"] |= {"warmup": 1}
    config["data"] |= {
        "datasets": str(dataset),
        "images_from": str(bench.folder / "source"),
        "streams": None,
        "workers": bench.cores if bench.on_cuda else 0,
        **(data or {}),
    }
    student = {"model": bench.model(model) if size.tiny else model}
    return settings.parse(StudentConfig, {**config, "output": str(output), "student": student, "evaluate": {}})
