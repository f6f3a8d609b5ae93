"""``make bench-augment``: CPU of decoding and augmenting a sample, by augmentation backend and image policy.

- *web images*: JPEGs of 512 pixels with 2 and with 10 augmentations at 224 pixels. ``decode`` is the strict decoding of
  a run, ``crops`` the crops and their resizing, ``ops`` RandAugment's operations and the array of the result.
  ``torchvision-pil-1 (Pillow)`` is without simplejpeg, ``fixed-point-1 (torch)`` without cykooz-resizer.
  ``device-1 (host)`` is what loader processes of a training do with it: they cut crops out.
- *photographs*: JPEGs of 3,000 pixels with 2 augmentations, decoded at their size and reduced.
- *cosines* of the embeddings of a committed teacher of the demo, between the crops of ``torchvision-pil-1`` at full
  size and those of the other variants, for the same records (scaled to the reduced image).

Times are CPU milliseconds of this process, in one thread, as medians of rounds in which the variants alternate. They
depend on the machine and on what else runs on it; ratios are comparable between machines.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
import unittest.mock
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.loader import photo
from benchmarks.stored import write_results
from reinforce.config import Augmentations
from reinforce.images import backends as fixed_point
from reinforce.images import jpeg
from reinforce.images.backends import BACKENDS, Replayer, load_backend, sample_augmentation
from reinforce.images.device_records import CELL, fill_cell
from reinforce.images.policy import decode
from reinforce.images.records import Augmentation, replay
from reinforce.source.config import Limits
from teachers.pixels import to_pixels
from teachers.registry import load_model, teacher_spec

RESULTS = Path(__file__).parent / "results" / "augment.json"
TEACHER = Path(__file__).parents[1] / "configs" / "demo-models" / "conv-64"
SIZE = 224
WEB_SIDE, PHOTOGRAPH_SIDE = 512, 3000
COUNTS = (2, 10)
REDUCED = ("rgb-1-reduced-896", "rgb-1-reduced-448", "rgb-1-reduced-224")
TARGETS = {"web images, 2 augmentations": 0.5, "photographs": 1 / 3}
LIMITS = Limits()
Records = Sequence[Sequence[Augmentation]]


@dataclass(frozen=True)
class Variant:
    """How samples are decoded and augmented."""

    replay: Replayer
    policy: str = "rgb-1"
    simplejpeg: bool = True

    def decode(self, photos: Sequence[bytes]) -> list[Image.Image]:
        load = jpeg.load if self.simplejpeg else _leave_to_pillow
        with unittest.mock.patch.object(jpeg, "load", load):
            return [decode(data, LIMITS, strict=True, policy=self.policy) for data in photos]


def _leave_to_pillow(image: Image.Image, data: bytes) -> bool:
    return False


def variants() -> dict[str, Variant]:
    """The augmentation backends, the default one with Pillow alone, and ``fixed-point-1`` as torch computes it."""
    resize = fixed_point.RESIZERS["torch"]()

    def by_torch(image: Image.Image, augmentation: Augmentation, size: int | None = None) -> np.ndarray:
        return np.asarray(replay(image, augmentation, size, resize, fixed_point.OPERATIONS))

    backends = {name: Variant(load_backend(name)) for name in BACKENDS}
    pillow = {"torchvision-pil-1 (Pillow)": Variant(load_backend("torchvision-pil-1"), simplejpeg=False)}
    return {**pillow, **backends, "fixed-point-1 (torch)": Variant(by_torch)}


def leave_to_device(image: Image.Image, augmentation: Augmentation, size: int | None = None) -> np.ndarray:
    """The host's part of the backend ``device-1``."""
    cell = np.empty((CELL * SIZE, CELL * SIZE, 3), np.uint8)
    fill_cell(image, augmentation, size or SIZE, cell)
    return cell


def records_of(images: Sequence[Image.Image], count: int) -> Records:
    policy = Augmentations(count=count, size=SIZE)
    return [
        [sample_augmentation(policy, 0, str(number), k, *image.size) for k in range(count)]
        for number, image in enumerate(images)
    ]


def seconds_of(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(photos: Sequence[bytes], variant: Variant, count: int) -> dict[str, float]:
    """CPU milliseconds per sample of each phase."""
    images: list[Image.Image] = []
    decoding = seconds_of(lambda: images.extend(variant.decode(photos)))
    records = records_of(images, count)
    crops = [[replace(record, ops=None) for record in of_image] for of_image in records]

    def run(of: Records) -> None:
        for image, of_image in zip(images, of, strict=True):
            for record in of_image:
                variant.replay(image, record)

    run([of_image[:1] for of_image in crops])  # pages of the images are in memory
    cropping = seconds_of(functools.partial(run, crops))
    both = seconds_of(functools.partial(run, records))
    seconds = {"decode": decoding, "crops": cropping, "ops": both - cropping, "all": decoding + both}
    return {name: 1000 * value / len(photos) for name, value in seconds.items()}


def compare(photos: Sequence[bytes], of: Mapping[str, Variant], count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Medians over rounds in which the variants alternate."""
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in of}
    for variant in of.values():
        measure(photos[:2], variant, count)  # warms up
    for _ in range(rounds):
        for name, variant in of.items():
            figures[name].append(measure(photos, variant, count))
    return {
        name: {phase: statistics.median(figure[phase] for figure in rounds_of) for phase in rounds_of[0]}
        for name, rounds_of in figures.items()
    }


def cosines(photos: Sequence[bytes], of: Mapping[str, Variant], count: int) -> dict[str, dict[str, float]]:
    """Mean and 1st percentile of the cosines between a teacher's embeddings of the default crops and a variant's."""
    teacher = load_model("conv-64", teacher_spec(model=f"local-dir:{TEACHER}"), "cpu")
    preprocessing = teacher.image
    assert preprocessing is not None

    def embed(variant: Variant) -> torch.Tensor:
        images = variant.decode(photos)
        records = records_of(images, count)  # a reduced image gets the same relative crop
        crops = [variant.replay(image, record) for image, own in zip(images, records, strict=True) for record in own]
        with torch.inference_mode():
            return teacher.encode_images(to_pixels(torch.from_numpy(np.stack(crops)), preprocessing))

    expected = embed(Variant(load_backend("torchvision-pil-1")))
    result = {}
    for name, variant in of.items():
        values = (embed(variant) * expected).sum(dim=-1)
        result[name] = {"mean": values.mean().item(), "1st percentile": values.quantile(0.01).item()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--web-images", type=int, default=32)
    parser.add_argument("--photographs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    web = [photo(seed, WEB_SIDE) for seed in range(options.web_images)]
    large = [photo(seed, PHOTOGRAPH_SIDE) for seed in range(options.photographs)]
    of = variants()
    reduced = {name: variant for name, variant in of.items() if name != "fixed-point-1 (torch)"} | {
        f"{backend}, {policy}": Variant(of[backend].replay, policy) for policy in REDUCED for backend in BACKENDS
    }
    host = {**of, "device-1 (host)": Variant(leave_to_device)}
    tables = {f"web images, {count} augmentations": compare(web, host, count, options.rounds) for count in COUNTS}
    tables["photographs"] = compare(large, reduced, COUNTS[0], options.rounds)
    similar = {
        "web images": cosines(web, of, COUNTS[1]),
        "photographs": cosines(large, reduced, 8 * COUNTS[1]),
    }
    report(tables, similar, {"web images": web, "photographs": large}, options)


def report(
    tables: Mapping[str, dict[str, dict[str, float]]],
    similar: Mapping[str, Any],
    photos: Mapping[str, Sequence[bytes]],
    options: argparse.Namespace,
) -> None:
    console = Console()
    ratios = {}
    for title, figures in tables.items():
        phases = list(next(iter(figures.values())))
        table = Table("variant", *phases, "ratio", title=f"CPU ms per sample: {title}")
        base = next(iter(figures.values()))["all"]
        ratios[title] = {name: of["all"] / base for name, of in figures.items()}
        for name, of in figures.items():
            table.add_row(name, *(f"{of[phase]:.2f}" for phase in phases), f"{ratios[title][name]:.2f}")
        console.print(table)
    for title, of_variant in similar.items():
        table = Table("variant", "mean", "1st percentile", title=f"cosine to torchvision-pil-1 at full size: {title}")
        for name, values in of_variant.items():
            table.add_row(name, *(f"{value:.5f}" for value in values.values()))
        console.print(table)
    result = {
        "rounds": options.rounds,
        "images": {
            title: {"count": len(data), "mean bytes": round(statistics.mean(map(len, data)))}
            for title, data in photos.items()
        },
        "targets": TARGETS,
        "ratios": ratios,
        "cpu ms per sample": tables,
        "cosines": similar,
    }
    write_results(options.results, ("pillow", "numpy", "torch", "cykooz-resizer", "simplejpeg"), result)
    console.print(f"written to {options.results}")


if __name__ == "__main__":
    main()
