"""``make bench``: throughput of the pipeline compared with its limits on this machine.

Every figure is a median over rounds that alternate between the variants. Absolute numbers depend on the machine; ratios
are comparable between machines. ``--device cuda`` runs the models on an accelerator.
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
from reinforce.engine.decode_pool import DecodePool
from reinforce.engine.decoding import DecodeSpec
from reinforce.engine.models import Models
from reinforce.engine.plan import PendingShard, make_plan
from reinforce.engine.recipe import build_layers, describe_models
from reinforce.engine.rows import Row, RowSpec, rows_from_source
from reinforce.engine.shard import process_shard
from reinforce.source.image import decode
from teachers.device import Accelerator
from teachers.protocols import ImageSpec, Teacher

ROUNDS = 5
SHARDS = 6


class FixedTimeTeacher:
    """A teacher that takes a fixed time per image and no CPU time, so that only the pipeline is measured."""

    dim = 512
    logit_scale: float | None = 50.0
    image: ImageSpec | None = ImageSpec(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def __init__(self, device: torch.device, seconds_per_image: float = 0.0) -> None:
        self.seconds = seconds_per_image
        self.first = float("inf")  # time of the first call
        self._row = torch.nn.functional.normalize(torch.ones(1, self.dim, device=device), dim=-1)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        self.first = min(self.first, time.perf_counter())
        time.sleep(self.seconds * len(pixels))
        return self._row.expand(len(pixels), -1)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return self._row.expand(len(texts), -1)


def photo(seed: int, side: int = 512) -> bytes:
    """Return a JPEG with about as much detail as a photograph: smooth shapes and some noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray((rng.random((16, 16, 3)) * 255).astype(np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(coarse, np.int16) + rng.normal(0, 8, (side, side, 3)).astype(np.int16)
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def write_shard(path: Path, photos: Sequence[bytes]) -> None:
    """Write a tar of photos with captions."""
    with tarfile.open(path, "w") as tar:
        for i, data in enumerate(photos):
            for name, content in ((f"{i:06d}.jpg", data), (f"{i:06d}.txt", f"a photo of thing {i}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def compare(variants: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Measure the variants alternately; return the median of each."""
    figures: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, measure in variants.items():
            figures[name].append(measure())
    return {name: statistics.median(values) for name, values in figures.items()}


class Bench:
    """Source shards in ``folder``, and measurements of the pipeline on them."""

    def __init__(self, folder: Path, device: str, threads: int, images: int) -> None:
        self.folder, self.threads, self.images = folder, threads, images
        self.accelerator = Accelerator(device)
        self.pool = DecodePool(threads)
        self.pool.wait_until_ready()
        photos = [photo(i) for i in range(32)]
        for shard in range(SHARDS):
            write_shard(folder / f"{shard}.tar", [photos[i % 32] for i in range(images)])
        self.photos = [photos[i % 32] for i in range(images)]

    def config(self, output: str) -> Config:
        return parse_config(
            {
                "source": f"{self.folder}/*.tar",
                "output": f"{self.folder}/{output}",
                "teachers": {"fixed": {"class": "benchmarks.pipeline:FixedTimeTeacher"}},
                "workers": {"cpus": self.threads},
            }
        )

    def decode_only(self) -> float:
        """Return samples/s of decoding and augmenting alone with all threads, the limit of the pipeline."""
        config = self.config("none")
        policy, limits = config.augmentations, config.input.limits

        def process(item: tuple[int, bytes]) -> None:
            image = decode(item[1], limits)
            for k in range(policy.count):
                np.asarray(replay(image, sample_augmentation(policy, 0, str(item[0]), k, *image.size)))

        with ThreadPoolExecutor(self.threads) as pool:
            start = time.perf_counter()
            for _ in pool.map(process, enumerate(self.photos)):
                pass
            return self.images / (time.perf_counter() - start)

    def rows(self) -> float:
        """Return samples/s of rows that are read, decoded and augmented ahead for the models."""
        config = self.config("none")
        spec = RowSpec(crops=True)
        with self.pool.lease(DecodeSpec(config, spec.layout(config)), 257) as lease:
            start = time.perf_counter()
            count = 0
            for row in rows_from_source(config, f"{self.folder}/0.tar", spec, lease, window=256):
                assert isinstance(row, Row)
                assert row.cell is not None
                lease.free.release([row.cell])
                count += 1
            return count / (time.perf_counter() - start)

    def shards(self, in_flight: int, seconds_per_image: float) -> tuple[float, float]:
        """Process whole shards; return samples/s, and the share of time after the first batch that models run."""
        with tempfile.TemporaryDirectory(dir=self.folder) as output:
            config = self.config(Path(output).name)
            layers: dict[str, Layer] = build_layers(config, describe_models(config))
            pending: list[PendingShard] = make_plan(config).pending
            teacher = FixedTimeTeacher(self.accelerator.device, seconds_per_image)
            teachers: dict[str, Teacher] = {"fixed": teacher}
            models = Models(teachers, {}, self.accelerator)
            store = Store(config.output)
            with ThreadPoolExecutor(in_flight) as leases:
                start = time.perf_counter()
                list(leases.map(lambda shard: process_shard(shard, config, layers, store, models, self.pool), pending))
                end = time.perf_counter()
            return models.counters.samples / (end - start), models.counters.busy / (end - teacher.first)


def texts(device: str, count: int = 64) -> dict[str, float]:
    """Return texts/s of a ViT-B/32's text tower: trimmed to the longest text of the batch, and at full length."""
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
    parser.add_argument("--threads", type=int, default=2, help="decoding threads, like workers.cpus")
    parser.add_argument("--images", type=int, default=256, help="images per shard")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.device, options.threads, options.images)
        print(f"device {bench.accelerator.device}, {options.threads} threads, 512 px JPEG, 2 augmentations at 224")
        speed = compare({"limit": bench.decode_only, "rows": bench.rows, "shards": lambda: bench.shards(2, 0.0)[0]})
        limit = speed["limit"]
        print(f"decode and augment only         {limit:8.0f} samples/s, the limit")
        print(f"rows read ahead for the models  {speed['rows']:8.0f} samples/s, {speed['rows'] / limit:.2f} of it")
        print(f"whole shards, models take 0 s   {speed['shards']:8.0f} samples/s, {speed['shards'] / limit:.2f} of it")
        pace = 1.4 / (2 * speed["shards"])  # the models take 1.4 times as long as everything else
        busy = compare({"one": lambda: bench.shards(1, pace)[1], "two": lambda: bench.shards(2, pace)[1]})
        print(f"accelerator busy, one shard in flight {busy['one']:.2f}, two {busy['two']:.2f}")
    speed = texts(options.device)
    ratio = speed["trimmed"] / speed["full length"]
    print(f"trimmed texts                   {speed['trimmed']:8.0f} texts/s, {ratio:.1f} times as many as untrimmed")


if __name__ == "__main__":
    main()
