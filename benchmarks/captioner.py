"""``make bench-captioner``: a captioner's training step and its loader, compared with open_clip's own.

Steps of one small CoCa on the same images and captions are measured alternately: *ours* (``CaptioningTask``, with the
loop's backward pass and AdamW) and *open_clip* (the model's forward, ``CoCaLoss``, backward and AdamW, as
``open_clip_train.train`` runs them). Both losses have weight, 1 and 2. Times are CPU seconds of this process.

Loaders read the same tars of photograph-like JPEGs with captions, with the same number of processes, crops and
tokenizer: *ours* are streams (``CaptionStreams``), *open_clip* is ``open_clip_train.data.get_wds_dataset``, the
webdataset pipeline of its trainer. The consumer does nothing. Ratios of medians are comparable between machines.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
from rich.console import Console
from rich.table import Table
from webdataset.tariterators import tar_file_expander

from benchmarks.loader import compare, sentence, write_source
from benchmarks.step import model_folder
from benchmarks.stored import write_results
from reinforce.captioning.config import CaptionerConfig
from reinforce.captioning.data import CaptionStreams, load_streams, predicted_lengths
from reinforce.captioning.finetune import CaptioningTask
from reinforce.captioning.model import build_captioner
from reinforce.settings import parse
from reinforce.training.checkpoints import make_adamw
from reinforce.training.config import Optimizer
from reinforce.training.step import backpropagate
from teachers.open_clip.text import Tokenizer
from teachers.pixels import to_pixels
from teachers.runtime.accelerator import Accelerator

RESULTS = Path(__file__).parent / "results" / "captioner.json"
TOKENIZER = "coca_ViT-B-32"
SMALL = {
    "embed_dim": 256,
    "vision_cfg": {
        "image_size": 224,
        "layers": 6,
        "width": 384,
        "head_width": 64,
        "patch_size": 32,
        "attentional_pool": True,
        "attn_pooler_heads": 4,
        "output_tokens": True,
    },
    "text_cfg": {
        "context_length": 76,
        "vocab_size": 49408,
        "width": 256,
        "heads": 4,
        "layers": 6,
        "embed_cls": True,
        "output_tokens": True,
    },
    "multimodal_cfg": {
        "context_length": 76,
        "vocab_size": 49408,
        "width": 256,
        "heads": 4,
        "layers": 6,
        "attn_pooler_heads": 4,
    },
    "custom_text": True,
}
SIZE, PREFETCH, WARMUP = 224, 2, 8


def config_of(folder: Path, model: str, **data: Any) -> CaptionerConfig:
    """A pre-training of ``model`` from random weights, on the tars in ``folder``."""
    return parse(
        CaptionerConfig,
        {
            "output": str(folder / "out"),
            "captioner": {"model": model, "pretrained": "random"},
            "data": {"source": f"{folder}/*.tar", "captions": ["txt"], **data},
            "held_out": {"share": 0.01},
            "train": {"steps": 1, "batch": 2},
        },
    )


def make_steps(folder: Path, model: str, batch: int) -> dict[str, Callable[[], None]]:
    """One training step of ours and of open_clip, of models with equal weights."""
    if model == "small":
        model = model_folder(folder / "small", SMALL, weights=False)
    config = config_of(folder, model)
    ours, theirs = (build_captioner(config).train() for _ in range(2))
    tokens = Tokenizer(model)([sentence(seed) for seed in range(batch)])
    end = int(Tokenizer(model)([""])[0, 1])
    images = torch.randint(0, 256, (batch, SIZE, SIZE, 3), dtype=torch.uint8)
    examples = {"image": images, "caption": tokens, "length": predicted_lengths(tokens, end)}
    task = CaptioningTask(ours, config.loss, evaluator=None)  # type: ignore[arg-type]
    accelerator = Accelerator("cpu")
    optimizers = [make_adamw(one, Optimizer(lr=1e-5)) for one in (ours, theirs)]
    coca, pixels = theirs.coca, to_pixels(images, theirs.image)
    loss = open_clip.loss.CoCaLoss(caption_loss_weight=config.loss.caption, clip_loss_weight=config.loss.contrastive)

    def step_ours() -> None:
        backpropagate(task, ours, examples, batch, [0], accelerator)
        optimizers[0].step()
        optimizers[0].zero_grad(set_to_none=True)

    def step_theirs() -> None:
        sum(loss(**coca(pixels, tokens), output_dict=True).values()).backward()
        optimizers[1].step()
        optimizers[1].zero_grad(set_to_none=True)
        with torch.no_grad():
            coca.logit_scale.clamp_(0, math.log(100))

    return {"ours": step_ours, "open_clip": step_theirs}


def time_steps(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each step, measured alternately after one of each."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if number:
                seconds[name].append(time.process_time() - start)
    return seconds


def our_batches(folder: Path, processes: int, batch: int) -> Iterator[Any]:
    """The batches of this project's streams."""
    config = config_of(folder, TOKENIZER, workers=processes, prefetch=PREFETCH)
    tokenize = Tokenizer(TOKENIZER)
    feed = CaptionStreams(load_streams(config, SIZE)[0], tokenize, int(tokenize([""])[0, 1]))
    feed.set_up(1, batch, processes)
    return feed.batches(0, 1, batch, 0)


def open_clip_batches(folder: Path, shards: int, images: int, processes: int, batch: int) -> Iterator[Any]:
    """Endless batches of the loader of open_clip's trainer."""
    from open_clip_train import data

    # The installed webdataset ends each shard with an empty item, at which the trainer's loader fails.
    data.tar_file_expander = partial(tar_file_expander, eof_value=None)
    preprocess = image_transform_v2(PreprocessCfg(size=SIZE), is_train=True, aug_cfg=AugmentationCfg())
    args = Namespace(
        train_data=f"{folder}/{{00000..{shards - 1:05d}}}.tar",
        train_num_samples=images,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=batch,
        workers=processes,
        world_size=1,
    )
    loaded = data.get_wds_dataset(args, preprocess, is_train=True, tokenizer=open_clip.get_tokenizer(TOKENIZER))
    while True:
        yield from loaded.dataloader


def consume(batches: Iterator[Any], batch: int, images: int) -> None:
    for _ in range(images // batch):
        next(batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help="CoCa whose step is measured, by its name in open_clip")
    parser.add_argument("--batch", type=int, default=32, help="samples of a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="loader processes")
    parser.add_argument("--images", type=int, default=1024, help="images that the loaders read")
    parser.add_argument("--loader-batch", type=int, default=64)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, photos = write_source(folder, options.images, 1, distinct=64)
        shards = len([*folder.glob("*.tar")])
        seconds = time_steps(make_steps(folder, options.model, options.batch), options.rounds)
        size = options.loader_batch
        loaders = {
            "ours": our_batches(folder, options.processes, size),
            "open_clip": open_clip_batches(folder, shards, 10**6, options.processes, size),
        }
        variants = {name: partial(consume, batches, size) for name, batches in loaders.items()}
        figures = compare(variants, options.rounds, 8 * size, WARMUP * size)
    step = {name: statistics.median(values) for name, values in seconds.items()}
    medians = {name: {k: statistics.median(v) for k, v in of.items()} for name, of in figures.items()}
    table = Table("", "CPU s a step", "samples/s of the loader", "CPU ms a sample", title=f"{options.model}")
    for name, loader in medians.items():
        table.add_row(name, f"{step[name]:.3f}", f"{loader['images/s']:.0f}", f"{loader['cpu ms']:.2f}")
    Console().print(table)
    result = {
        "model": options.model,
        "batch": options.batch,
        "processes": options.processes,
        "loader batch": size,
        "photographs": {"mean bytes": round(photos["bytes"]), "mean pixels": round(photos["pixels"])},
        "ratios": {
            "step": step["open_clip"] / step["ours"],
            "loader by images/s": medians["ours"]["images/s"] / medians["open_clip"]["images/s"],
            "loader by cpu ms": medians["open_clip"]["cpu ms"] / medians["ours"]["cpu ms"],
        },
        "step": {"median seconds": step, "seconds": seconds},
        "loader": {"medians": medians, "figures": figures},
    }
    write_results(options.results, ("torch", "torchvision", "pillow", "open_clip_torch", "webdataset"), result)
    print(f"written to {options.results}")


if __name__ == "__main__":
    from benchmarks.captioner import main as imported  # so that other processes can import the classes by name

    imported()
