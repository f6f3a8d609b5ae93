"""``reinforce export onnx``, ``coreml`` and others: a folder that runs a model without torch and open_clip.

What all targets share. The towers are compared with those of the trained model, and the tokenizer with open_clip's,
before the folder is published.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch.nn.functional import normalize

from reinforce.errors import UserError
from reinforce.evaluation.config import Evaluation
from reinforce.evaluation.evaluator import Evaluator
from reinforce.evaluation.model_names import model_errors, short_name
from reinforce.shipping import tokens
from reinforce.shipping.checks import GOLDEN, HELD_OUT, Agreement, check_golden, compare, compare_on_sets, write_golden
from reinforce.shipping.packages import TARGETS, load_target
from reinforce.shipping.targets.base import (
    BOTH,
    IMAGE,
    ExportOptions,
    Run,
    Target,
    Tower,
    reparameterize,
    size_of,
    split_towers,
    step,
    step_screen,
)
from reinforce.storage import Storage
from reinforce.terminal import format_bytes
from teachers.backbones import load_network
from teachers.open_clip.teacher import image_spec, load_model, model_name
from teachers.open_clip.text import Tokenizer
from teachers.pixels import to_pixels
from teachers.protocols import ImageSpec
from teachers.spec import ModelSpec, TeacherSpec

#: Default of the smallest cosine to the trained model that is published.
MIN_COSINE = 0.99
_GENERATED = 64  # pictures and texts that are compared without an evaluation


@dataclass(frozen=True)
class ExportResult:
    """An exported folder; ``report`` is the content of its ``export.json``."""

    output: str
    report: dict[str, Any]

    def lines(self) -> list[str]:
        trained, exported = (self.report["metrics"].get(name, {}) for name in ("trained", "exported"))
        towers = self.report["towers"]
        named = {side: tower["file"] for side, tower in towers.items()}
        if len({*named.values()}) < len(named):
            named = {side: f"{file}, {side} tower" for side, file in named.items()}
        of_tokens = []
        if (found := self.report["tokenizer"]) is not None:
            of_tokens.append(f"tokenizer.json: same tokens as the student for {found['same']} test texts")
            if found["misread"]:
                of_tokens.append(tokens.Misread(**found["misread"]).line())
        return [
            *(
                f"{named[side]}: {format_bytes(tower['bytes'])}; cosine to the trained model at least "
                f"{tower['cosine']['min']:.5f}, mean {tower['cosine']['mean']:.5f}; largest difference "
                f"{tower['largest_difference']:.1e}"
                for side, tower in towers.items()
            ),
            *(
                f"{tower['file']}: {delegate['name']} computes {delegate['operations']} of {delegate['of']} operations "
                f"({delegate['share']:.0%})"
                for tower in towers.values()
                if (delegate := tower.get("delegate"))
            ),
            *(f"{name}: {100 * exported[name]:.2f} %, trained model {100 * trained[name]:.2f} %" for name in exported),
            f"compared: {self.report['compared']}, in {self.report['executed_by']}",
            *of_tokens,
            f"written: {self.output}; its README.md has an example",
        ]


@dataclass(frozen=True)
class _Model:
    """A model to export. ``references`` are its towers by name, before reparameterization.

    ``towers`` are those that are exported; ``tokenizer`` is None without the text tower.
    """

    towers: list[Tower]
    references: dict[str, Run]
    image: ImageSpec
    tokenizer: Any
    config: dict[str, Any]


def export_model(
    target: str,
    name: str,
    spec: ModelSpec,
    output: str,
    options: ExportOptions,
    min_cosine: float = MIN_COSINE,
    evaluation: Evaluation | None = None,
) -> ExportResult:
    """Write a model for a target of ``TARGETS`` to ``output``, a new folder or fsspec URI.

    With the sets of an ``evaluation``, the pictures and texts of these are compared, otherwise generated ones, and the
    metrics of both models are reported. Raises UserError, and then nothing is written.
    """
    runtime = load_target(target)
    store = Storage(output)
    _check_new(store)
    evaluator = Evaluator(evaluation) if evaluation is not None and evaluation.metrics else None
    with model_errors(name), _publish_folder(store) as folder, step_screen() as screen:
        tokenize = None if isinstance(spec, TeacherSpec) else Tokenizer(model_name(spec))
        if tokenize is None:  # a network of images alone
            options = replace(options, tower=IMAGE)
        else:
            options = replace(options, config=open_clip.get_model_config(model_name(spec)) or {})
        model = _load(name, spec, options.tower, runtime.fuses)
        runtime.refuse(model.towers, options)
        paths = {}
        for tower in model.towers:
            with step(screen, f"{tower.name} tower: conversion to {runtime.title}"):
                paths[tower.name] = _convert(runtime, tower, folder, options)
        runs = {side: runtime.load(path) for side, path in paths.items()}
        with step(screen, "comparison with the trained model"):
            found: dict[str, Agreement] = {}
            metrics: dict[str, dict[str, float]] = {}
            if evaluator is not None:
                models = {"trained": model.references, "exported": {**model.references, **runs}}
                found, metrics = compare_on_sets(evaluator, models, model.image, tokenize)
            for tower in model.towers:
                if tower.name not in found:
                    run, reference = runs[tower.name], model.references[tower.name]
                    found[tower.name] = compare(run, reference, tower.example(_GENERATED))
        for side in runs:
            _check_agreement(side, found[side], target, options, min_cosine)
        about = {side: {**found[side].as_json(), **runtime.about(path)} for side, path in paths.items()}
        of_tokens = None  # how many test texts have the student's tokens, and those that have others
        if model.tokenizer is not None:
            misread = tokens.misread_texts(model.tokenizer, model_name(spec))
            of_tokens = {"same": len(tokens.PROBES), "misread": None if misread is None else asdict(misread)}
        _write_common(folder, runtime, model, paths["image"])
        report = {
            "target": target,
            "model": options.model,
            "weights": options.weights,
            "towers": {
                side: {"file": path.name, "bytes": size_of(path), **about[side]} for side, path in paths.items()
            },
            "executed_by": runtime.executor or runtime.title,
            "compared": "pictures and texts of the evaluation" if evaluator else "generated pictures and texts",
            "metrics": metrics,
            "tokenizer": of_tokens,
            "versions": {package: version(package) for package in ("torch", *TARGETS[target].packages)},
        }
        (folder / "export.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return ExportResult(store.url, report)


def check_export(target: str, folder: str, min_cosine: float = MIN_COSINE) -> list[str]:
    """Run the golden file of an exported folder in its runtime on this machine. Raises UserError if it differs."""
    runtime = load_target(target)
    lines = []
    for side, found in check_golden(folder, target, runtime.load).items():
        if not found.minimum >= min_cosine:
            raise UserError(
                f"{folder}: the {side} tower has a cosine of {found.minimum:.4f} to the golden file's embeddings, less "
                f"than --min-cosine {min_cosine:g}. Export it again, or look for an operation that this runtime "
                "computes otherwise."
            )
        agrees = f"cosine at least {found.minimum:.5f} to {found.count} embeddings of {GOLDEN}"
        lines.append(f"{side}: {agrees}, in {runtime.executor or runtime.title}")
    return lines


def _load(name: str, spec: ModelSpec, tower: str, fuses: bool) -> _Model:
    """Load a model of open_clip, or a network of images alone, which has no texts."""
    clip: Any
    tokenizer = texts = None
    if isinstance(spec, TeacherSpec):
        clip, image = load_network(spec)
    else:
        clip = load_model(spec)
        image = image_spec(open_clip.get_model_preprocess_cfg(clip))
        if tower == BOTH:
            tokenizer = tokens.convert_tokenizer(model_name(spec))
            texts = torch.tensor([text.ids for text in tokenizer.encode_batch([*tokens.PROBES, *HELD_OUT])])
    clip.eval().requires_grad_(False)
    references: dict[str, Run] = {
        "image": lambda images: normalize(clip.encode_image(to_pixels(images, image)), dim=-1),
        "text": lambda rows: normalize(clip.encode_text(rows), dim=-1),
    }
    fused = reparameterize(clip)  # refuses captioners
    towers = split_towers(fused if fuses else clip, image, texts)
    # Return the content of ``preprocess.json``, with open_clip's keys where they exist.
    context_length = None if texts is None else texts.shape[1]
    scale, bias = (getattr(clip, key, None) for key in ("logit_scale", "logit_bias"))
    config = {
        "model": short_name(name),
        "size": [image.height, image.width],
        "mode": "RGB",
        "resize_mode": "shortest" if image.resize == "crop" else "squash",
        "interpolation": image.interpolation,
        "mean": list(image.mean),
        "std": list(image.std),
        "normalised_by": "",
        "context_length": context_length,
        "dim": 0,
        "logit_scale": None if scale is None else float(scale.exp()),
        "logit_bias": None if bias is None else float(bias),
    }
    config["dim"] = references["image"](towers[0].example(1)).shape[1]
    return _Model(towers, references, image, tokenizer, config)


def _convert(runtime: Target, tower: Tower, folder: Path, options: ExportOptions) -> Path:
    try:
        return runtime.convert(tower, folder, options)
    except ValueError:
        raise
    except Exception as error:  # of any converter
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"its {tower.name} tower cannot be converted to {runtime.title}: {reason}") from error


def _check_agreement(side: str, agreement: Agreement, target: str, options: ExportOptions, min_cosine: float) -> None:
    """Raise ValueError if a converted tower is too far from the trained one."""
    runtime, packages = load_target(target), TARGETS[target].packages
    allowed = 1e-4 if options.weights == "fp32" else sys.float_info.max  # of smaller weights the cosine alone decides
    if not agreement.difference <= allowed:
        raise ValueError(
            f"its {side} tower in {runtime.title} differs by {agreement.difference:.1e} from torch, more than the "
            f"allowed {allowed:.0e}: look for weights that are not finite or very large, or try other versions of "
            f"{' and '.join([', '.join(packages[:-1]), packages[-1]] if packages[1:] else packages)}"
        )
    if agreement.minimum < min_cosine:
        raise ValueError(
            f"its {side} tower with {options.weights} weights has a cosine of {agreement.minimum:.4f} to the trained "
            f"one, less than --min-cosine {min_cosine:g}: use other --weights, or allow less"
        )


def _write_common(folder: Path, runtime: Target, model: _Model, image_file: Path) -> None:
    """Write the files that every target has."""
    config = {**model.config, "normalised_by": image_file.name}
    (folder / "preprocess.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(runtime.readme(config, model.image), encoding="utf-8")
    rows = {}
    if model.tokenizer is not None:
        model.tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        rows = {text: model.tokenizer.encode(text).ids for text in tokens.PROBES}
    write_golden(folder / GOLDEN, model.references, model.image, rows)
    runtime.complete(folder, model.tokenizer)


def _check_new(store: Storage) -> None:
    """Raise UserError if the output exists and is not an empty folder, so that files of two models never mix."""
    if store.fs.exists(store.root) and (not store.fs.isdir(store.root) or store.fs.ls(store.root)):
        raise UserError(f"{store.url} already exists: remove it, or give another --output.")
    if store.local:
        try:
            os.makedirs(os.path.dirname(store.root) or ".", exist_ok=True)
        except OSError as error:
            raise UserError(f"{store.url} cannot be written: {error}. Give another --output.") from error


@contextlib.contextmanager
def _publish_folder(store: Storage) -> Iterator[Path]:
    """Yield a local folder that is published when the block ends, and discarded if it raises.

    On a local disk the whole folder appears atomically; in an object store each file does.
    """
    parent = (os.path.dirname(store.root) or ".") if store.local else None
    with tempfile.TemporaryDirectory(prefix=".reinforce-", dir=parent) as temporary:
        folder = Path(temporary, "folder")
        folder.mkdir()
        yield folder
        if not store.local:
            store.put_folder(str(folder))
            return
        for path in folder.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        os.replace(folder, store.root)
