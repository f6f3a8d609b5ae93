"""Students whose image encoder is a FastViT of four or five stages, and the time that it takes for an image."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.ablations.measures import MILLISECONDS, MILLISECONDS_ALONE
from reinforce.shipping.towers import reparameterize
from teachers.open_clip.catalog import CONFIG_FILE, FOLDER_PREFIX
from teachers.open_clip.teacher import random_model

#: The demo's student, whose text encoder and tokenizer all have.
_STUDENT = Path("configs/student-demo")
_TIMED, _ROUNDS = "milliseconds.json", 15
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
    """Write the folders of these encoders with their milliseconds, unless all have them; the encoders take turns.

    CPU milliseconds of one thread, with random weights, reparameterised as for export: medians per image of a batch,
    and of an image alone.
    """
    if all((encoder.folder(out) / _TIMED).exists() for encoder in encoders):
        return
    for encoder in encoders:
        encoder.write(out)
    passes = {
        (encoder, name): _forward_pass(encoder, out, batch) for encoder in encoders for name, batch in _BATCHES.items()
    }
    milliseconds: dict[tuple[Encoder, str], list[float]] = {key: [] for key in passes}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for number in range(_ROUNDS):
        for key in passes if number % 2 == 0 else reversed(passes):
            passes[key]()
            start = time.process_time()
            passes[key]()
            milliseconds[key].append(1e3 * (time.process_time() - start) / _BATCHES[key[1]])
    torch.set_num_threads(threads)
    for encoder in encoders:
        medians = {name: statistics.median(milliseconds[encoder, name]) for name in _BATCHES}
        (encoder.folder(out) / _TIMED).write_text(json.dumps(medians), encoding="utf-8")


def _forward_pass(encoder: Encoder, out: Path, batch: int) -> Callable[[], None]:
    clip = reparameterize(random_model(encoder.model(out)))
    pixels = torch.randn(batch, 3, encoder.size, encoder.size)

    def run() -> None:
        with torch.inference_mode():
            clip.encode_image(pixels)

    return run


def read_milliseconds(encoder: Encoder, out: Path) -> dict[str, float]:
    """Return what `prepare` measured, by the name of the measure."""
    milliseconds: dict[str, float] = json.loads((encoder.folder(out) / _TIMED).read_text(encoding="utf-8"))
    return milliseconds
