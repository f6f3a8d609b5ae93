"""Students whose image encoder is a FastViT of four or five stages, and the time that it takes for an image."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ablations.measures import MILLISECONDS, MILLISECONDS_ALONE
from reinforce.shipping.latency import measure_latency
from reinforce.shipping.packages import TORCH
from teachers.open_clip.catalog import CONFIG_FILE, FOLDER_PREFIX
from teachers.spec import ModelSpec

#: The demo's student, whose text encoder and tokenizer all have.
_STUDENT = Path("configs/student-demo")
_TIMED, _ROUNDS = "milliseconds.json", 60
#: Measure -> images of a forward pass.
_BATCHES = {MILLISECONDS: 64, MILLISECONDS_ALONE: 1}


@dataclass(frozen=True)
class Encoder:
    """MobileCLIP2-S3's image encoder with other sizes: blocks of each stage, channels of the first, pixels.

    Each stage halves the height and width of the one before, and has twice its channels; the first has a quarter of the
    image's. The last two of five stages, and the last of four, have attention.
    """

    blocks: tuple[int, ...]
    width: int
    size: int

    @property
    def name(self) -> str:
        return f"{'-'.join(map(str, self.blocks))}-width-{self.width}-size-{self.size}"

    def folder(self, out: Path) -> Path:
        return out / "encoders" / self.name

    def model(self, out: Path) -> str:
        """Return `student.model`."""
        return f"{FOLDER_PREFIX}{self.folder(out)}"

    def write(self, out: Path) -> None:
        """Write the student's folder, without weights; timm reads the image encoder from a folder in it."""
        folder = self.folder(out)
        image = folder / "image"
        image.mkdir(parents=True, exist_ok=True)
        for path in _STUDENT.glob("tokenizer*.json"):
            shutil.copy(path, folder)
        config: dict[str, Any] = json.loads((_STUDENT / CONFIG_FILE).read_text(encoding="utf-8"))
        config["model_cfg"]["vision_cfg"] = {
            "image_size": self.size,
            "timm_model_name": f"{FOLDER_PREFIX}{image}",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": None,
        }
        config["preprocess_cfg"]["size"] = self.size
        stages = len(self.blocks)
        architecture = {
            "layers": self.blocks,
            "embed_dims": [self.width << stage for stage in range(stages)],
            "mlp_ratios": [4] * stages,
            "downsamples": [stage > 0 for stage in range(stages)],
            "se_downsamples": [False] * stages,
        }
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")
        (image / "config.json").write_text(
            json.dumps({"architecture": "fastvit_mci3", "model_args": architecture, "pretrained_cfg": {}}),
            encoding="utf-8",
        )


def prepare(encoders: Sequence[Encoder], out: Path) -> None:
    """Write the folders of these encoders with their milliseconds, unless all have them.

    They are those of `reinforce export latency` on one core: medians of CPU time per image of a batch, and of an image
    alone.
    """
    if all((encoder.folder(out) / _TIMED).exists() for encoder in encoders):
        return
    for encoder in encoders:
        encoder.write(out)
    specs = {encoder.name: ModelSpec(model=encoder.model(out)) for encoder in encoders}
    medians: dict[str, dict[str, float]] = {name: {} for name in specs}
    for measure, batch in _BATCHES.items():
        report = measure_latency(specs, rounds=_ROUNDS, threads=1, clock="process", batch=batch)
        for name, about in report.models.items():
            medians[name][measure] = about["milliseconds"][TORCH]["image"]["median"] / batch
    for encoder in encoders:
        (encoder.folder(out) / _TIMED).write_text(json.dumps(medians[encoder.name]), encoding="utf-8")


def read_milliseconds(encoder: Encoder, out: Path) -> dict[str, float]:
    """Return what `prepare` measured, by the name of the measure."""
    milliseconds: dict[str, float] = json.loads((encoder.folder(out) / _TIMED).read_text(encoding="utf-8"))
    return milliseconds
