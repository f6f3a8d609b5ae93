"""What every export shares: the towers of a model as separate modules, its progress, and the interface of a runtime."""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import open_clip
import torch
from rich.console import Console
from timm.utils.model import reparameterize_model
from torch.nn.functional import normalize

from reinforce.reports import render_markdown
from reinforce.terminal import Screen, format_duration
from teachers.protocols import ImageSpec


@dataclass(frozen=True)
class Tower:
    """A tower to export: ``name`` of its file, ``input`` of the graph, and ``example(n)`` inputs of n rows."""

    name: str
    input: str
    module: torch.nn.Module
    example: Callable[[int], torch.Tensor]


class ExportedImageTower(torch.nn.Module):
    """uint8 RGB pixels [N, height, width, 3] -> float32 embeddings [N, dim] of unit norm.

    The normalization by mean and standard deviation is part of the graph, so that callers cannot get it wrong.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, clip: Any, spec: ImageSpec) -> None:
        super().__init__()
        self.clip, self.spec = clip, spec
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.encode(images.permute(0, 3, 1, 2).float() / 255)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Float pixels [N, 3, height, width] between 0 and 1 -> float32 [N, dim] of unit norm."""
        return normalize(self.clip.encode_image((pixels - self.mean) / self.std), dim=-1)


class ExportedTextTower(torch.nn.Module):
    """int64 tokens [N, context length] -> float32 [N, dim] of unit norm."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return normalize(self.clip.encode_text(tokens), dim=-1)


def reparameterize(clip: Any) -> Any:
    """Return the model for inference, with the branches of a FastViT (or another model of timm) fused.

    The given model is unchanged and shares all other weights. Raises ValueError for a captioner.
    """
    if isinstance(clip, open_clip.CoCa):
        raise ValueError("it is a captioner, whose decoder cannot be exported: use a CLIP model")
    fused = copy.copy(clip.eval().requires_grad_(False))
    fused._modules = dict(clip._modules)  # a shallow copy shares the dict of submodules
    fused.visual = reparameterize_model(clip.visual)
    return fused


def split_towers(clip: Any, spec: ImageSpec, tokens: torch.Tensor | None) -> list[Tower]:
    """Return the towers of a model, with example inputs: smooth random images, and ``tokens`` [M, context length].

    Without tokens it is the image tower alone. The images are not pure noise, since most models give all
    noise the same embedding.
    """

    def images(count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        smooth = torch.rand(count, 3, 4, 4, generator=generator)
        smooth = torch.nn.functional.interpolate(smooth, (spec.height, spec.width), mode="bicubic")
        noise = torch.rand(smooth.shape, generator=generator) - 0.5
        return ((smooth + 0.1 * noise).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).contiguous()

    towers = [Tower("image", "images", ExportedImageTower(clip, spec).eval(), images)]
    if tokens is not None:
        towers.append(
            Tower(
                "text",
                "tokens",
                ExportedTextTower(clip).eval(),
                lambda count: tokens[torch.arange(count) % len(tokens)],
            )
        )
    return towers


def count_parameters(clip: Any) -> dict[str, int]:
    """Return the number of parameters of each tower, without the logit scale and bias."""
    image = sum(parameter.numel() for parameter in clip.visual.parameters())
    whole = sum(parameter.numel() for name, parameter in clip.named_parameters() if not name.startswith("logit_"))
    return {"image": image, "text": whole - image}


_REDRAW_SECONDS = 1.0  # of a step that goes on


@contextlib.contextmanager
def step_screen() -> Iterator[Screen]:
    """Yield a screen on a copy of standard output, which stays open when ``silenced`` redirects that of the process."""
    with contextlib.ExitStack() as stack:
        console = None
        with contextlib.suppress(OSError, ValueError, AttributeError):  # not a file
            sys.stdout.flush()
            number = os.dup(sys.stdout.fileno())
            copy = stack.enter_context(open(number, "w", encoding=sys.stdout.encoding, errors="backslashreplace"))
            console = Console(file=copy, highlight=False)
        yield stack.enter_context(Screen(console))


@contextlib.contextmanager
def step(screen: Screen, label: str) -> Iterator[None]:
    """Show what is done and the time since it began; once it is done, print how long it took."""
    start, ended = time.monotonic(), threading.Event()

    def redraw() -> None:
        while not ended.wait(_REDRAW_SECONDS):
            screen.draw(f"{label}: {format_duration(time.monotonic() - start)}", 0, 1)

    screen.draw(label, 0, 1)
    thread = threading.Thread(target=redraw, name="step", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    screen.log(f"{label}: {format_duration(time.monotonic() - start)}")


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Discard what converters, in Python or C++, print on standard output and error."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [(number, os.dup(number)) for number in (1, 2)]
    with open(os.devnull, "w", encoding="utf-8") as null, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for number, _ in saved:
                os.dup2(null.fileno(), number)
            with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):  # in notebooks not 1, 2
                yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in saved:
                os.dup2(copy, number)
                os.close(copy)


#: ``ExportOptions.tower``: both towers, or the image tower alone.
BOTH, IMAGE = "both", "image"
#: The inputs of a tower, as ``Tower.example`` returns them, N rows -> embeddings, float32 [N, dim], unit norm.
Run = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ExportOptions:
    """``model``: its short name; ``weights``: one of ``Target.weights``; ``app_names``: names of the authors' app.

    ``tower``: BOTH or IMAGE; ``whole``: the tower that the target has already converted with fp32 weights, if any;
    ``config``: open_clip's ``model_cfg``.
    """

    model: str
    weights: str
    app_names: bool = False
    tower: str = BOTH
    whole: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


class Target(ABC):
    """A runtime. ``title`` is its name in messages, ``weights`` are the precisions in which it stores weights,
    ``template`` makes the README of a model, ``fuses`` is whether training branches are fused before,
    and ``executor`` is what ``load`` runs a tower in, in reports, if it is not the runtime."""

    title: ClassVar[str]
    weights: ClassVar[tuple[str, ...]]
    template: ClassVar[str]
    fuses: ClassVar[bool] = True
    executor: ClassVar[str | None] = None

    def refuse(self, towers: Sequence[Tower], options: ExportOptions) -> None:  # noqa: B027  (optional)
        """Raise ValueError with what is not supported. Called before any tower is converted."""

    @abstractmethod
    def convert(self, tower: Tower, folder: Path, options: ExportOptions) -> Path:
        """Write a tower into ``folder``; return the path that ``load`` takes. Raises ValueError with the operation."""

    @abstractmethod
    def load(self, path: Path, threads: int | None = None) -> Run:
        """Load a converted tower into its runtime on the CPU."""

    def about(self, path: Path) -> dict[str, Any]:
        """Return what else ``export.json`` has about a converted tower."""
        return {}

    def complete(self, folder: Path, tokenizer: Any) -> None:  # noqa: B027  (optional)
        """Write what else the folder needs. ``tokenizer`` is that of tokenizer.json, None without a text tower."""

    def readme(self, config: Mapping[str, Any], image: ImageSpec) -> str:
        """Return README.md of an exported folder. ``config`` is the content of its ``preprocess.json``."""
        return render_markdown(
            self.template,
            model=config["model"],
            height=image.height,
            width=image.width,
            dim=config["dim"],
            context=config["context_length"],
            texts=config["context_length"] is not None,
            resize=image.resize,
            interpolation=image.interpolation,
            image_file=(image_file := config["normalised_by"]),
            text_file=(text_file := image_file.replace("_image.", "_text.")),
            image_class=image_file.partition(".")[0],
            text_class=text_file.partition(".")[0],
        )


def size_of(path: Path) -> int:
    """Bytes of a converted tower, a file or a folder, and of the files whose names begin with its name."""
    found = (file for one in path.parent.glob(f"{path.name}*") for file in (one, *one.rglob("*")))
    return sum(file.stat().st_size for file in found if file.is_file())


def row_by_row(run: Run) -> Run:
    """Return a function for any number of rows, of one that takes a single row."""
    return lambda inputs: torch.cat([run(row) for row in inputs.split(1)])
