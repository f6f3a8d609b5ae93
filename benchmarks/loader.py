"""``make bench-loader``: throughput of a student's data loader, compared with its limit and with webdataset.

Three variants are measured alternately, with the same number of processes, the same photograph-like JPEGs and the same
distribution of augmentations (`bare` and `loader` even have the same records). The consumer does nothing.

- *bare*: decode and augment images that are in memory; nothing is read, tokenized, batched or sent;
- *loader*: ``StudentFeed``: Parquet layers aligned, sampled, decoded, replayed, true and synthetic caption tokenized,
  embeddings of two teachers, in batches of uint8 pixels;
- *webdataset*: tars through webdataset with torchvision's RandomResizedCrop (bicubic), RandAugment, ToTensor and
  Normalize on PIL images, the true caption by the same tokenizer, in batches of float32 pixels.

Images per second depend on the machine; ratios of medians are comparable between machines.
"""

from __future__ import annotations

import argparse
import io
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarks.processes import Children, cpu_of_all, serve
from benchmarks.stored import write_results, write_tar
from reinforce.config import Augmentations, parse_config
from reinforce.dataset.manifest import update_manifest, write_manifest
from reinforce.dataset.store import Store
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.worker.decode import DecodePool
from reinforce.engine.worker.models import describe_loaded, load_models
from reinforce.engine.worker.shard import ShardProcess
from reinforce.images.backends import load_backend
from reinforce.images.policy import decode
from reinforce.images.records import AUGMENTATION_BACKEND, Augmentation
from reinforce.student.config import Data
from reinforce.student.data.datasets import open_datasets
from reinforce.student.data.feed import StudentFeed
from reinforce.training.order import GroupChunk
from teachers.open_clip.text import Tokenizer
from teachers.protocols import ImageSpec

RESULTS = Path(__file__).parent / "results" / "loader.json"
SIZE = 224
AUGMENTATIONS = {"count": 5, "size": SIZE}
SHARDS = 4
PHOTOS = 256  # distinct photographs
BATCH = 256
PREFETCH = 2
STEPS = 8  # batches per measurement
WARMUP = 8  # batches before it, more than the loaders prefetch
TOKENIZER = "ViT-B-32"
HALF = (0.5, 0.5, 0.5)
BOUNDS = {"loader / bare": 0.9, "loader / webdataset": 1.5}
WORDS = ("a", "photo", "of", "the", "small", "old", "brown", "dog", "house", "street", "on", "near", "green", "wooden")


class RandomTeacher:
    """A teacher with random embeddings of a common dimension."""

    dim = 768
    logit_scale = 50.0
    image = ImageSpec(224, HALF, HALF)

    def __init__(self, device: torch.device, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._vectors(len(pixels))

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return self._vectors(len(texts))

    def _vectors(self, rows: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(rows, self.dim, generator=self._generator), dim=-1)


class RandomCaptioner:
    """A captioner with random captions of a common length."""

    image = ImageSpec(8, HALF, HALF)

    def __init__(self, device: torch.device, captions: int = 5) -> None:
        self.captions = captions

    def caption(self, pixels: torch.Tensor, seeds: np.ndarray) -> list[list[str]]:
        return [[sentence(int(seed)) for seed in row] for row in seeds]


def sentence(seed: int, words: int = 14) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


def photo(seed: int, side: int | None = None) -> bytes:
    """Return a JPEG with the spectrum of a photograph: about 1.2 bits per pixel.

    ``side`` is the longer side in pixels; default: a common web size.
    """
    rng = np.random.default_rng(seed)
    width = int(rng.integers(500, 801))
    width = side or width
    height = width * 3 // 4
    if rng.random() < 0.3:
        width, height = height, width
    pixels = np.zeros((height, width, 3), np.float32)
    for octave in range(2, max(9, (side or 0).bit_length())):
        cells = 2**octave * np.array([height, width]) // max(width, height)
        noise = rng.normal(size=(*cells, 3)).astype(np.float32)
        noise = 0.75 * noise.mean(axis=2, keepdims=True) + 0.35 * noise  # more luminance than chrominance
        for channel in range(3):
            layer = Image.fromarray(noise[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., channel] += np.asarray(layer) * 2 ** (-0.9 * octave)
    pixels = 128 + pixels * (50 / pixels.std()) + rng.normal(scale=4, size=pixels.shape)
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=int(rng.integers(85, 91)))
    return out.getvalue()


def write_source(folder: Path, images: int, processes: int, distinct: int = PHOTOS) -> tuple[str, dict[str, float]]:
    """Write shards of photographs with captions; return their URL, and the mean size of the photographs."""
    if processes == 1:
        photos = [photo(seed) for seed in range(distinct)]
    else:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            photos = list(pool.map(photo, range(distinct), chunksize=8))
    for shard in range(SHARDS):
        samples = (
            (f"{i:08d}", {"jpg": photos[i % distinct], "txt": sentence(i).encode(), "json": b'{"uid": "%d"}' % i})
            for i in range(shard, images, SHARDS)
        )
        write_tar(folder / f"{shard:05d}.tar", samples)
    pixels = [width * height for width, height in (Image.open(io.BytesIO(data)).size for data in photos)]
    means = {"bytes": statistics.mean(map(len, photos)), "pixels": statistics.mean(pixels)}
    return f"{folder}/{{00000..{SHARDS - 1:05d}}}.tar", means


def reinforce(source: str, output: str, backend: str = AUGMENTATION_BACKEND, processes: int = 1) -> None:
    """Reinforce a dataset as ``reinforce run`` does, in this process and decode processes."""
    teachers = {
        name: {"class": f"{__name__}:RandomTeacher", "options": {"seed": seed}} for seed, name in enumerate("ab")
    }
    captioners = {"random": {"class": f"{__name__}:RandomCaptioner", "captions": 5}}
    config = parse_config(
        {
            "source": source,
            "output": output,
            "augmentations": {**AUGMENTATIONS, "backend": backend},
            "teachers": teachers,
            "captioners": captioners,
        }
    )
    plan, store = make_plan(config), Store(output)
    models = load_models(config, plan.layers.values())
    loaded = describe_loaded(models, config)
    with DecodePool(processes) as pool:
        for shard in plan.pending:
            ShardProcess(shard, config, plan.layers, store, models, pool).run()
    write_manifest(store, update_manifest(None, config, plan.layers, loaded))


def decode_in_memory(pipe: Connection, url: str, number: int, processes: int) -> None:
    """Decode and augment as many images as the parent requests, until it closes the pipe. They are in memory."""
    [dataset] = open_datasets(Data.model_validate({"datasets": url}), 0, {})
    chunks = [GroupChunk(g, 0, int(dataset.groups[g, 2])) for g in range(number, len(dataset.groups), processes)]
    examples = itertools.cycle([row for chunk in chunks for row in dataset.load(chunk, 0).rows if row is not None])

    def decode_and_augment(count: int) -> None:
        for example in itertools.islice(examples, count):
            assert isinstance(example.augmentation, Augmentation)
            replay = load_backend(example.file.backend)
            replay(decode(example.image, example.file.limits), example.augmentation)

    serve(pipe, decode_and_augment)


def loader_batches(url: str, processes: int, batch: int = BATCH) -> Iterator[Any]:
    """Return the batches of this project's loader."""
    data = Data.model_validate({"datasets": url, "workers": processes, "prefetch": PREFETCH, "window": 1024})
    return iter(StudentFeed(data, 0, SIZE, Tokenizer(TOKENIZER)).batches(0, 1, batch, 0))


def webdataset_batches(source: str, processes: int, batch: int = BATCH) -> Iterator[Any]:
    """Return endless batches of webdataset, with the same distribution of augmentations."""
    policy = Augmentations()
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                SIZE, policy.scale, policy.ratio, interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandAugment(policy.rand_augment.ops, policy.rand_augment.magnitude),
            transforms.ToTensor(),
            transforms.Normalize(HALF, HALF),
        ]
    )
    dataset = webdataset.WebDataset(source, resampled=True, shardshuffle=False).shuffle(1000).decode("pil")
    dataset = dataset.to_tuple("jpg", "txt").map_tuple(transform, SingleText(Tokenizer(TOKENIZER))).batched(batch)
    context = multiprocessing.get_context("forkserver")
    return iter(
        DataLoader(
            dataset,
            batch_size=None,
            num_workers=processes,
            prefetch_factor=PREFETCH,
            multiprocessing_context=context,
        )
    )


class SingleText:
    """Tokenizes one text at a time; picklable, unlike a lambda."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> torch.Tensor:
        return self._tokenizer([text])[0]


def make_variants(
    source: str, datasets: Mapping[str, str], processes: int, batch: int = BATCH
) -> dict[str, Callable[[int], None]]:
    """What is compared, by name: functions that deliver a number of images.

    ``datasets`` are URLs by a suffix of the names of their two variants, *bare* and *loader*.
    """
    batches = {f"loader{suffix}": loader_batches(url, processes, batch) for suffix, url in datasets.items()}
    batches["webdataset"] = webdataset_batches(source, processes, batch)

    def consume(name: str, images: int) -> None:
        for _ in range(images // batch):
            next(batches[name])

    bare = {
        f"bare{suffix}": Children(decode_in_memory, [(url, number, processes) for number in range(processes)])
        for suffix, url in datasets.items()
    }

    def decode_alone(name: str, images: int) -> None:
        bare[name].run([images // processes] * processes)

    variants: dict[str, Callable[[int], None]] = {name: partial(decode_alone, name) for name in bare}
    return variants | {name: partial(consume, name) for name in batches}


def compare(
    variants: Mapping[str, Callable[[int], None]],
    rounds: int,
    images: int = STEPS * BATCH,
    warmup: int = WARMUP * BATCH,
) -> dict[str, dict[str, list[float]]]:
    """Measure the variants alternately: images per second, and CPU milliseconds of all processes per image."""
    figures: dict[str, dict[str, list[float]]] = {name: {"images/s": [], "cpu ms": []} for name in variants}
    for number in range(rounds):
        for name, run in variants.items():
            wait_until_idle()
            run(warmup)  # uses up the prefetched batches
            start, cpu = time.perf_counter(), cpu_of_all()
            run(images)
            seconds, cpu = time.perf_counter() - start, cpu_of_all() - cpu
            figures[name]["images/s"].append(images / seconds)
            figures[name]["cpu ms"].append(1000 * cpu / images)
        print(f"round {number + 1}: " + ", ".join(f"{n} {f['images/s'][-1]:.0f} images/s" for n, f in figures.items()))
    return figures


def wait_until_idle(seconds: float = 0.25) -> None:
    """Wait until no process prefetches batches any more."""
    before, now = 0.0, cpu_of_all()
    while now - before > 0.1 * seconds:
        time.sleep(seconds)
        before, now = now, cpu_of_all()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--processes", type=int, default=cores, help="processes of each variant; default: cores")
    parser.add_argument("--images", type=int, default=2048, help="images in the dataset")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source, photos = write_source(Path(folder), options.images, cores)
        reinforce(source, f"{folder}/out")
        figures = compare(make_variants(source, {"": f"{folder}/out"}, options.processes), options.rounds)
    report(figures, photos, options)


def report(figures: dict[str, dict[str, list[float]]], photos: dict[str, float], options: argparse.Namespace) -> None:
    medians = {name: {k: statistics.median(v) for k, v in of.items()} for name, of in figures.items()}
    ratios = {
        f"loader / {other}": {
            "images/s": medians["loader"]["images/s"] / medians[other]["images/s"],
            "cpu ms": medians[other]["cpu ms"] / medians["loader"]["cpu ms"],
        }
        for other in ("bare", "webdataset")
    }
    table = Table("variant", "images/s", "cpu ms/image", title=f"{options.processes} processes, batches of {BATCH}")
    for name, of in medians.items():
        table.add_row(name, f"{of['images/s']:.0f}", f"{of['cpu ms']:.2f}")
    bounds = Table("ratio", "by images/s", "by cpu ms", "bound")
    for name, of in ratios.items():
        bounds.add_row(name, f"{of['images/s']:.2f}", f"{of['cpu ms']:.2f}", f"{BOUNDS[name]}")
    console = Console()
    console.print(table)
    console.print(bounds)
    result = {
        "processes": options.processes,
        "batch": BATCH,
        "photographs": {"mean bytes": round(photos["bytes"]), "mean pixels": round(photos["pixels"])},
        "ratios": ratios,
        "bounds": BOUNDS,
        "medians": medians,
        "figures": figures,
    }
    write_results(options.results, ("torch", "torchvision", "pillow", "pyarrow", "numpy", "webdataset"), result)
    console.print(f"written to {options.results}")


if __name__ == "__main__":
    from benchmarks.loader import main as imported  # so that other processes can import the classes by name

    imported()
