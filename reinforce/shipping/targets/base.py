"""Interface of a runtime for which models are exported."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from reinforce.markup import render_markdown
from reinforce.shipping.towers import Tower
from teachers.protocols import ImageSpec

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
    ``template`` makes the README of a model, and ``fuses`` is whether training branches are fused before."""

    title: ClassVar[str]
    weights: ClassVar[tuple[str, ...]]
    template: ClassVar[str]
    fuses: ClassVar[bool] = True

    @property
    def executor(self) -> str:
        """What ``load`` runs a tower in, in reports."""
        return self.title

    def max_difference(self, weights: str) -> float:
        """The largest allowed difference of an element from torch; of smaller weights the cosine alone decides."""
        return 1e-4 if weights == "fp32" else sys.float_info.max

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
