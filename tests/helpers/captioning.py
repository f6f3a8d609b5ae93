"""A tiny CoCa in training, and batches for it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from reinforce.captioning.config import CaptionerConfig, Loss
from reinforce.captioning.data import StreamedPairs, predicted_lengths
from reinforce.captioning.finetune import CaptioningTask
from reinforce.captioning.model import CaptionerModel, build_captioner
from reinforce.settings import parse
from reinforce.training.order import GroupChunk
from reinforce.training.task import Batch, Feed
from teachers.open_clip.text import Tokenizer
from tests.helpers.data import picture, write_tar
from tests.helpers.models.tiny_coca import END, IMAGE_SIZE, coca_model

TEXTS = ["a red apple on a table", "two dogs", "a small drawing of a cat with a hat, seen from behind", "fog"]


def captioner_config(folder: Path, **changes: Any) -> CaptionerConfig:
    """Config to fine-tune a tiny CoCa on ``folder``/shards in ``folder``/out; ``changes`` replace sections."""
    model = folder / "model"
    if not (model / "open_clip_model.safetensors").exists():
        coca_model(model)
    config: dict[str, Any] = {
        "output": str(folder / "out"),
        "captioner": {"model": f"local-dir:{model}"},
        "data": {"source": f"{folder}/shards/*.tar", "workers": 0},
        "held_out": {"share": 0.3},
        "train": {
            "steps": 4,
            "batch": 4,
            "optimizer": {"lr": 0.01, "warmup": 0, "weight_decay": 0.1},
            "checkpoints": {"every": 2},
            "log_every": 1,
        },
        "evaluate": {"captioned": 3, "generate": {"min_length": 0, "max_length": 8}, "batch": 4},
    }
    return parse(CaptionerConfig, {**config, **changes})


def make_captioner(folder: Path, **changes: Any) -> CaptionerModel:
    return build_captioner(captioner_config(folder, **changes))


def make_batch(texts: list[str], seed: int = 0) -> dict[str, Any]:
    """A batch of noise images with captions, in the feed's format."""
    tokens = Tokenizer("coca_ViT-B-32")(texts)
    noise = torch.randint(
        0, 256, (len(texts), IMAGE_SIZE, IMAGE_SIZE, 3), generator=torch.Generator().manual_seed(seed)
    )
    return {
        "key": [str(i) for i in range(len(texts))],
        "image": noise.to(torch.uint8),
        "caption": tokens,
        "length": predicted_lengths(tokens, END),
    }


def write_shards(folder: Path, *sizes: int, captions: int = 1) -> None:
    """Write shards of pictures with captions in a JSON list, and a text member."""
    for shard, size in enumerate(sizes):
        members = []
        for i in range(size):
            key = f"{shard:03d}{i:04d}"
            texts = [f"thing {i} of shard {shard}, view {n}" for n in range(captions)]
            members += [
                (f"{key}.png", picture(shard * 1000 + i)),
                (f"{key}.json", json.dumps({"captions": texts}).encode()),
                (f"{key}.txt", f"text of {key}".encode()),
            ]
        write_tar(folder / "shards" / f"{shard:05d}.tar", members)


def captioned(images: Mapping[str, bytes], text: str = "a caption") -> list[tuple[str, bytes]]:
    """Members of a tar: images by key, each with a text, in which ``KEY`` stands for its key."""
    members = []
    for key, image in images.items():
        members += [(f"{key}.png", image), (f"{key}.txt", text.replace("KEY", key).encode())]
    return members


def task_losses(model: CaptionerModel, batch: Batch, loss: Loss) -> dict[str, torch.Tensor]:
    """Losses of a batch as the training loop computes them."""
    return CaptioningTask(model, loss, evaluator=None).losses(model(batch), batch)  # type: ignore[arg-type]


def take(feed: Feed, steps: int, rank: int = 0, ranks: int = 1, batch: int = 4, start: int = 0) -> list[Any]:
    """The batches of some steps of one rank."""
    batches = feed.batches(rank, ranks, batch, start)
    try:
        return list(itertools.islice(batches, steps))
    finally:
        batches.close()


def take_keys(pairs: StreamedPairs) -> set[str]:
    """The keys of all examples of an epoch."""
    chunks = [GroupChunk(group, 0, rows) for group, rows in enumerate(pairs.counts.tolist())]
    return {row.key for chunk in chunks for row in pairs.load(chunk, 0).rows if row is not None}


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two batches are equal."""
    tensors = all(torch.equal(a[name], b[name]) for name in ("image", "caption"))
    return tensors and a["key"] == b["key"] and a["length"] == b["length"]
