"""``make bench``: how near the pipeline comes to its limits on this machine.

Every figure is a median over rounds that alternate between the sides of a comparison; absolute numbers belong to the
machine, ratios travel. ``--device cuda`` runs the models on an accelerator.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from reinforce.config import Config, parse_config
from reinforce.dataset.augment import replay, sample_augmentation
from reinforce.dataset.layers import Layer
from reinforce.dataset.store import Store
from reinforce.engine.models import Models
from reinforce.engine.plan import PendingShard, make_plan
from reinforce.engine.recipe import build_layers, describe_models
from reinforce.engine.rows import RowSpec, rows_from_source
from reinforce.engine.shard import process_shard
from reinforce.source.image import decode
from teachers.device import Accelerator
from teachers.protocols import ImageSpec, Teacher

ROUNDS = 5
SHARDS = 6


class Fixed:
    """A teacher whose accelerator takes a fixed time per image and none of the CPU's: what is left is the pipeline."""

    dim = 512
    logit_scale: float | None = 50.0
    image: ImageSpec | None = ImageSpec(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def __init__(self, device: torch.device, seconds_per_image: float = 0.0) -> None:
        self.seconds = seconds_per_image
        self.first = float("inf")  # when the accelerator was first wanted
        self._row = torch.nn.functional.normalize(torch.ones(1, self.dim, device=device), dim=-1)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        self.first = min(self.first, time.perf_counter())
        time.sleep(self.seconds * len(pixels))
        return self._row.expand(len(pixels), -1)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return self._row.expand(len(texts), -1)


def photo(seed: int, side: int = 512) -> bytes:
    """A JPEG with a photograph's amount of detail: smooth shapes and some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray((rng.random((16, 16, 3)) * 255).astype(np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(coarse, np.int16) + rng.normal(0, 8, (side, side, 3)).astype(np.int16)
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def write_shard(path: Path, photos: Sequence[bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for i, data in enumerate(photos):
            for name, content in ((f"{i:06d}.jpg", data), (f"{i:06d}.txt", f"a photo of thing {i}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def compare(sides: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Medians of each side's figure, measured in turns."""
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, side in sides.items():
            figures[name].append(side())
    return {name: statistics.median(values) for name, values in figures.items()}


class Bench:
    def __init__(self, folder: Path, device: str, threads: int, images: int) -> None:
        self.folder, self.threads, self.images = folder, threads, images
        self.accelerator = Accelerator(device)
        photos = [photo(i) for i in range(32)]
        for shard in range(SHARDS):
            write_shard(folder / f"{shard}.tar", [photos[i % 32] for i in range(images)])
        self.photos = [photos[i % 32] for i in range(images)]

    def config(self, output: str) -> Config:
        return parse_config(
            {
                "source": f"{self.folder}/*.tar",
                "output": f"{self.folder}/{output}",
                "teachers": {"fixed": {"class": "benchmarks.pipeline:Fixed"}},
                "workers": {"cpus": self.threads},
            }
        )

    def bare(self) -> float:
        """Samples/s of decoding and augmenting alone, all threads: the limit of everything that follows."""
        config = self.config("none")
        policy, limits = config.augmentations, config.input.limits

        def work(item: tuple[int, bytes]) -> None:
            image = decode(item[1], limits)
            for k in range(policy.count):
                np.asarray(replay(image, sample_augmentation(policy, 0, str(item[0]), k, *image.size)))

        with ThreadPoolExecutor(self.threads) as pool:
            start = time.perf_counter()
            for _ in pool.map(work, enumerate(self.photos)):
                pass
            return self.images / (time.perf_counter() - start)

    def rows(self) -> float:
        """Samples/s of rows read, decoded and augmented ahead, as models get them."""
        config = self.config("none")
        with ThreadPoolExecutor(self.threads) as pool:
            start = time.perf_counter()
            rows = rows_from_source(config, f"{self.folder}/0.tar", RowSpec(crops=True), pool, window=256)
            count = sum(1 for _ in rows)
            return count / (time.perf_counter() - start)

    def shards(self, in_flight: int, seconds_per_image: float) -> tuple[float, float]:
        """(samples/s, share of the time from the first batch on in which the accelerator works) of whole shards."""
        with tempfile.TemporaryDirectory(dir=self.folder) as output:
            config = self.config(Path(output).name)
            layers: dict[str, Layer] = build_layers(config, describe_models(config))
            pending: list[PendingShard] = make_plan(config).pending
            teacher = Fixed(self.accelerator.device, seconds_per_image)
            teachers: dict[str, Teacher] = {"fixed": teacher}
            models = Models(teachers, {}, self.accelerator)
            store = Store(config.output)
            with ThreadPoolExecutor(self.threads) as pool, ThreadPoolExecutor(in_flight) as leases:
                start = time.perf_counter()
                list(leases.map(lambda shard: process_shard(shard, config, layers, store, models, pool), pending))
                end = time.perf_counter()
            return models.counters.samples / (end - start), models.counters.busy / (end - teacher.first)


def texts(device: str, count: int = 64) -> dict[str, float]:
    """Texts/s of a ViT-B/32's text tower, cut to the longest of the batch against the full length."""
    import open_clip

    from teachers.open_clip_text import TextEncoder

    accelerator = Accelerator(device)
    model = accelerator.prepare(open_clip.create_model("ViT-B-32"))
    side = TextEncoder(model, open_clip.get_tokenizer("ViT-B-32"), accelerator)
    batch = [f"a photo of thing {i} on a wooden table" for i in range(count)]

    def timed(trim: bool) -> float:
        side._trims = trim
        start = time.perf_counter()
        with accelerator.forward():
            side.encode(side.tokenize(batch))
        accelerator.synchronize()
        return count / (time.perf_counter() - start)

    return compare({"trimmed": lambda: timed(True), "full length": lambda: timed(False)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="decoding threads, as workers.cpus")
    parser.add_argument("--images", type=int, default=256, help="images a shard")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.device, options.threads, options.images)
        print(f"device {bench.accelerator.device}, {options.threads} threads, 512 px JPEG, 2 augmentations at 224")
        read = compare({"bare": bench.bare, "rows": bench.rows, "shards": lambda: bench.shards(2, 0.0)[0]})
        limit = read["bare"]
        print(f"decode and augment alone        {limit:8.0f} samples/s, the limit")
        print(f"rows read ahead for the models  {read['rows']:8.0f} samples/s, {read['rows'] / limit:.2f} of it")
        print(f"whole shards, models for free   {read['shards']:8.0f} samples/s, {read['shards'] / limit:.2f} of it")
        pace = 1.4 / (2 * read["shards"])  # an accelerator that needs 1.4 times as long as all the rest
        busy = compare({"one": lambda: bench.shards(1, pace)[1], "two": lambda: bench.shards(2, pace)[1]})
        print(f"accelerator busy, one shard in flight {busy['one']:.2f}, two {busy['two']:.2f}")
    speed = texts(options.device)
    ratio = speed["trimmed"] / speed["full length"]
    print(f"texts cut to the longest        {speed['trimmed']:8.0f} /s, {ratio:.1f} times those at full length")


if __name__ == "__main__":
    main()
