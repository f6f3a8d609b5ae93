"""Evaluation by the external program clip_benchmark, which has the standard sets for image-text models.

It downloads its sets itself and decodes images with ``convert("RGB")``. ``reinforce evaluate`` can also read its
shards directly: labels are in ``cls``, class names in classnames.txt and templates in
zeroshot_classification_templates.txt.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from reinforce.errors import UserError
from reinforce.model_names import model_errors
from teachers.open_clip import catalog
from teachers.spec import ModelSpec

PROGRAM = "clip_benchmark"
_INSTALL = (
    "Its release 1.6.2 fails at zero-shot sets with numpy 2.4, so install it in a separate environment: "
    "`python -m venv bench && bench/bin/pip install clip-benchmark 'numpy<2.4'`, and add bench/bin to the PATH."
)

#: Where the authors of clip_benchmark publish the sets as shards.
ROOT = "https://huggingface.co/datasets/clip-benchmark/wds_{dataset_cleaned}/tree/main"
_VTAB = (
    "caltech101 cifar10 cifar100 clevr_count_all clevr_closest_object_distance diabetic_retinopathy dmlab "
    "dsprites_label_orientation dsprites_label_x_position dsprites_label_y_position dtd eurosat "
    "kitti_closest_vehicle_distance flowers pets pcam resisc45 smallnorb_label_azimuth smallnorb_label_elevation svhn"
)
_OTHERS = (
    "mscoco_captions flickr8k flickr30k imagenet1k imagenetv2 imagenet_sketch imagenet-a imagenet-r imagenet-o "
    "objectnet fer2013 voc2007 sun397 cars fgvc_aircraft mnist stl10 gtsrb country211 renderedsst2"
)
SETS = [f"wds/{name}" for name in _OTHERS.split()] + [f"wds/vtab/{name}" for name in _VTAB.split()]


def build_command(spec: ModelSpec, folder: Path, sets: list[str] | None = None, root: str = ROOT) -> list[str]:
    """Return the command that writes one JSON file per set into ``folder``.

    Raises UserError for a model name that clip_benchmark cannot parse, and for a checkpoint with preprocessing of its
    own, which clip_benchmark would not read.
    """
    name = str(spec.model)
    with model_errors(name):
        file = spec.pretrained is not None and catalog.is_checkpoint_file(spec.pretrained)
        if file and catalog.changed_preprocess(name, spec.pretrained, {}):
            raise ValueError(
                f"clip_benchmark does not read the preprocessing of {spec.pretrained} from the {catalog.CONFIG_FILE} "
                "beside it. Name the folder, as local-dir:PATH."
            )
    if "," in name:
        raise UserError(f"{name}: clip_benchmark splits names at commas. Move the folder to a path without a comma.")
    if name.startswith("local-dir:"):
        name = f"local-dir:{Path(name.removeprefix('local-dir:')).absolute()}"
    output = re.sub(r"([{}])", r"\1\1", str(folder.absolute())) + "/{dataset}_{task}.json"
    return [
        *(PROGRAM, "eval"),
        *("--pretrained_model", f"{name},{spec.pretrained or ''}"),
        *("--dataset", *(sets or SETS)),
        *("--dataset_root", root),
        *("--recall_k", "1", "5", "10"),
        *("--output", output),
    ]


def build_commands(specs: Mapping[str, ModelSpec], folder: Path) -> dict[str, list[str]]:
    """Return the command for each model. Raises UserError that lists them if the program is not installed."""
    commands = {label: build_command(spec, folder / _slug(label)) for label, spec in specs.items()}
    search_path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    program = shutil.which(PROGRAM, path=search_path)
    if program is None:
        shown = "\n".join(f"  mkdir -p {folder / _slug(label)} && {shlex.join(c)}" for label, c in commands.items())
        raise UserError(f"{PROGRAM} is not on the PATH. {_INSTALL} Then run this again, or:\n{shown}")
    return {label: [program, *rest] for label, (_, *rest) in commands.items()}


def run(command: Sequence[str], label: str, folder: Path) -> dict[str, float]:
    """Run clip_benchmark on a model -> metrics by ``clip_benchmark/SET/METRIC``. Raises UserError if it fails."""
    folder = folder / _slug(label)
    folder.mkdir(parents=True, exist_ok=True)
    process = subprocess.run(command, check=False)  # noqa: S603  (our own arguments, no shell)
    if process.returncode:
        raise UserError(
            f"{label}: clip_benchmark ended with status {process.returncode}; results of finished sets are in {folder}."
        )
    return read_results(folder)


def read_results(folder: Path) -> dict[str, float]:
    """Read the metrics of all JSON files that clip_benchmark wrote into a folder, without NaN and infinite values."""
    metrics: dict[str, float] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        name = result["dataset"].removeprefix("wds/")
        for metric, value in result["metrics"].items():
            if math.isfinite(value):  # top 5 of fewer than five classes is NaN
                metrics[f"clip_benchmark/{name}/{metric}"] = float(value)
    return metrics


def _slug(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", label).strip("_.") or "model"
