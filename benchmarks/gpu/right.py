"""Whether the device computes what a CPU computes in fp32, with every switch of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.gpu import recipe
from benchmarks.gpu.bench import Bench
from benchmarks.pipeline.figures import Figure
from teachers import registry
from teachers.open_clip.teacher import load_model
from teachers.spec import CaptionerSpec, TeacherSpec

RIGHT = "right"
RUNS, GRAPHS, EAGER = "as in runs", "graphs", "eager"
#: Keys of a teacher and of a captioner that choose how the same weights are computed.
TEACHERS: dict[str, dict[str, Any]] = {
    "as in runs": {},
    "compiled": {"compile": True},
    "not compiled": {"compile": False},
}
CAPTIONERS: dict[str, dict[str, Any]] = {
    RUNS: {},
    "compiled": {"compile": True},
    GRAPHS: {},  # where nothing can be compiled
    EAGER: {"compile": False},
}
COSINE = 0.999
LOGITS = 0.05  # difference of logits from those in fp32, as a share of the largest
_TEXT = "a photo of a dog that runs on the beach in the sun with a red ball and children watch it"


def measure_right(bench: Bench) -> list[Figure]:
    """Embeddings and logits of captions compared with fp32 on the CPU, and captions of graphs with those without."""
    figures: list[Figure] = []
    for name, spec in recipe.teachers(bench).items():
        figures += bench.attempt(f"right: {name}", partial(_compare_embeddings, bench, name, spec))
    name, captioner = recipe.captioner(bench)
    figures += bench.attempt(f"right: {name}, logits", partial(_compare_logits, bench, captioner))
    return figures + bench.attempt(f"right: {name}, captions", partial(_compare_captions, bench, captioner))


def captioners(bench: Bench, spec: CaptionerSpec) -> Iterator[tuple[str, CaptionerSpec]]:
    """A captioner with each of its switches. A CPU has no graphs, and takes minutes to compile."""
    switches = {name: keys for name, keys in CAPTIONERS.items() if bench.on_cuda or name in (RUNS, EAGER)}
    return recipe.available(spec, switches)


def load_switched(bench: Bench, switch: str, spec: CaptionerSpec) -> Any:
    """Load a captioner; with the switch ``GRAPHS`` as where nothing can be compiled."""
    uncompiled = patch.object(torch, "compile", side_effect=RuntimeError("graphs alone are measured"))
    with uncompiled if switch == GRAPHS else contextlib.nullcontext():
        return registry.load_model("captioner", spec, bench.device)


def pixels_of(image: Any, count: int) -> torch.Tensor:
    """[count, 3, H, W] on the CPU, each of other shapes in other colors, with a little noise."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 3, 6, 6, generator=random)
    size = (image.height, image.width)
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic", align_corners=False)
    return smooth + 0.1 * torch.randn(count, 3, *size, generator=random)


def texts_of(count: int) -> list[str]:
    """Texts of 3 to 20 words, each another one."""
    words = _TEXT.split()
    return [" ".join((words[n % 7 :] + words)[: 3 + n % 18]) + f" {n}" for n in range(count)]


def _compare_embeddings(bench: Bench, name: str, spec: TeacherSpec) -> list[Figure]:
    def embed(spec: TeacherSpec, device: str) -> dict[str, torch.Tensor]:
        teacher: Any = registry.load_model(name, spec, device)
        pixels = pixels_of(teacher.image, bench.size.compared).to(device)
        texts = teacher.encode_texts(texts_of(bench.size.compared))
        return {"images": teacher.encode_images(pixels).float().cpu(), "texts": texts.float().cpu()}

    expected = embed(recipe.changed(spec, precision="fp32", compile=False), "cpu")
    figures = []
    switches = {name: keys for name, keys in TEACHERS.items() if bench.on_cuda or keys != {"compile": False}}
    for switch, variant in recipe.available(spec, switches):  # runs on a CPU do not compile
        for side, found in embed(variant, bench.device).items():
            cosines = found @ expected[side].T
            lowest, what = float(cosines.diagonal().min()), f"{name}, {switch}, {side}"
            others = int((cosines.argmax(1) != torch.arange(len(cosines))).sum())
            figures += [
                Figure(RIGHT, f"{what}: lowest cosine to fp32 on the CPU", lowest, "cosine", COSINE, "at least"),
                Figure(RIGHT, f"{what}: nearer to the embedding of another input", others, "", 0.0, "at most"),
            ]
    return figures


def _compare_logits(bench: Bench, spec: CaptionerSpec) -> list[Figure]:
    """Logits of fixed texts, by open_clip's own forward pass on the CPU and by the captioner's steps."""
    count, words = bench.size.compared, bench.size.words
    tokens = torch.randint(1000, 40000, (count, words), generator=torch.Generator().manual_seed(1))
    pixels, expected = None, None
    figures = []
    for switch, variant in captioners(bench, spec):
        captioner = load_switched(bench, switch, variant)
        tokens[:, 0] = captioner._tokens.start
        if pixels is None or expected is None:
            pixels = pixels_of(captioner.image, count)
            expected = _reference_logits(spec, pixels, tokens)
        found = _logits(captioner, pixels.to(bench.device), tokens.to(bench.device))
        apart = float((found - expected).abs().max() / expected.abs().max())
        name = f"captioner, {switch}: largest difference of logits from fp32 on the CPU"
        figures.append(Figure(RIGHT, name, apart, "", LOGITS, "at most"))
    return figures


@torch.inference_mode()
def _reference_logits(spec: CaptionerSpec, pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    model: Any = load_model(spec).eval()
    latent, images = model._encode_image(pixels)
    logits: torch.Tensor = model(None, tokens, image_latent=latent, image_embs=images, output_labels=False)["logits"]
    return logits


@torch.inference_mode()
def _logits(captioner: Any, pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    decoder = captioner._decoder
    decoder.begin(captioner.encode(pixels), 1)
    steps = [decoder.next_logits(tokens[:, : n + 1]).float().cpu() for n in range(tokens.shape[1])]
    return torch.stack(steps, dim=1)


def _compare_captions(bench: Bench, spec: CaptionerSpec) -> list[Figure]:
    """Captions of one call that differ from those of another: in two calls, and with graphs and eager.

    Steps that are compiled round in other places, so only their logits are compared.
    """
    seeds = np.arange(bench.size.compared * spec.captions, dtype=np.uint64).reshape(-1, spec.captions)
    found: dict[str, Sequence[Any]] = {}
    figures = []
    for switch, variant in captioners(bench, spec):
        if variant.compile is True:
            continue
        captioner = load_switched(bench, switch, variant)
        pixels = pixels_of(captioner.image, bench.size.compared).to(bench.device)
        found[switch], again = (captioner.caption(pixels.clone(), seeds) for _ in range(2))
        name = f"captioner, {switch}: images whose captions differ in two calls"
        figures.append(Figure(RIGHT, name, _different(found[switch], again), "", 0.0, "at most"))
    different = _different(found.get(GRAPHS, found[RUNS]), found[EAGER])
    name = "captioner: images whose captions differ with graphs and eager"
    return [*figures, Figure(RIGHT, name, different, "", 0.0, "at most")]


def _different(one: Sequence[Any], other: Sequence[Any]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))
