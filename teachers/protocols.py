"""Protocols of the models that label a dataset. Read this file to plug in your own teacher, captioner or scorer.

A class of your own needs no base class and no registration. Name it in the config as ``class: package.module:Class``;
it is built in each worker as ``Class(device, **options)``, with a ``torch.device`` and the config's ``options``:

    class Radiology:                                   # teachers: {ours: {class: "our_lab.models:Radiology",
        dim = 512                                      #                   options: {weights: s3://bucket/rad.pt}}}
        image = ImageSpec(size=336, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        logit_scale = 50.0
        version = 1                                    # optional: raise it when the outputs change

        def __init__(self, device: torch.device, weights: str) -> None: ...

        def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:      # [B, 3, 336, 336] -> [B, 512]
            return torch.nn.functional.normalize(self.vision(pixels), dim=-1)

        def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:       # B strings -> [B, 512]
            return torch.nn.functional.normalize(self.text(self.tokenizer(texts)), dim=-1)

Attributes may also be set in ``__init__``. The layer fingerprint covers the class name, ``options`` and ``version``,
but neither the code nor the contents of files named in ``options``: raise ``version`` whenever the same options give
other outputs. A run stops if the file of the class has changed and ``version`` has not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

#: Of matrix products.
Precision = Literal["fp32", "tf32", "bf16", "fp16", "fp8"]
#: Bounds of temperatures of classifiers: with others, logits or their loss leave the range of float32.
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-3, 1e3


@dataclass(frozen=True)
class ImageSpec:
    """Preprocessing of a model's input images: resize to ``size``, then ``(x / 255 - mean) / std`` per RGB channel.

    ``size`` is in pixels, the side of a square or (height, width). ``mean`` and ``std`` apply to values in 0 to 1.
    ``resize`` states how an image of another aspect ratio is fitted: ``crop`` resizes the shorter side and cuts the
    center, ``squash`` resizes both sides. Augmented crops are square and are only resized.
    """

    size: int | tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    resize: Literal["crop", "squash"] = "crop"

    @property
    def height(self) -> int:
        return self.size if isinstance(self.size, int) else self.size[0]

    @property
    def width(self) -> int:
        return self.size if isinstance(self.size, int) else self.size[1]


class Teacher(Protocol):
    """A dual encoder that maps images and texts to unit-norm embeddings of one space.

    Either encoder may be missing. A teacher without ``encode_images`` (or with ``image = None``) gets text layers
    only; one without ``encode_texts`` gets image layers only.

    A teacher with a slow tokenizer may add ``tokenize(texts) -> tokens`` and ``encode_tokens(tokens) -> embeddings``.
    A run then calls these two instead of ``encode_texts``, so that one shard is tokenized while another uses the
    accelerator. Teachers with an equal, hashable ``tokenizer_key`` share the tokens of a batch.

    One with patches may add ``encode_patches(pixels) -> patches``, floating point [B, rows, columns, dim] of any norm,
    with the grid's first row at the top of the image; the shape of the grid must depend on that of the image alone.

    Inputs are the model's own and may be changed; outputs are copied before the next call and may reuse their memory.
    """

    #: Length of the embeddings.
    dim: int
    #: Preprocessing of ``pixels``; None for a teacher of texts.
    image: ImageSpec | None
    #: 1 / temperature of the teacher's softmax. ``logit_scale`` in the config overrides it; None if neither is known.
    logit_scale: float | None

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode float32 [B, 3, H, W] on the device, preprocessed by ``image`` -> floating point [B, dim], unit norm.

        A row with NaN or infinity is stored as null and quarantined as ``not_finite``.
        """
        ...

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Encode B strings of similar length -> floating point [B, dim], unit norm."""
        ...


@dataclass(frozen=True)
class NoCaptions:
    """Returned for an image without captions, with the reason in ``detail``. Its row is stored as null and quarantined
    as ``no_text``."""

    detail: str


class ServerUnavailable(RuntimeError):
    """No server that a model needs has answered for as long as its config allows. It ends the run."""


class Captioner(Protocol):
    """A model that writes ``captions`` synthetic captions for each image.

    It may add ``generate(pixels, seeds) -> tokens`` and ``to_texts(tokens) -> captions``. A run then calls these two
    instead of ``caption``, so that tokens become text while another shard uses the accelerator.

    Beside these two it may add ``draw(seeds) -> numbers``, an array with a row for each image, which ``generate`` then
    gets in place of seeds, so that random numbers are drawn while another shard uses the accelerator.

    One that replaces captions that have ended by those of further images sets ``by_group = True`` and divides
    ``generate`` further: ``encode(pixels) -> images``, a tensor with a row for each image, and ``decode(images, seeds,
    at_once) -> tokens`` of a list of such rows. A run then encodes the images of each batch and decodes those of a row
    group together, in their order. ``at_once`` is the most of them whose captions may be in work: memory allows no
    more. It may add ``reserve(image, at_once)``, which allocates for a test before the run what decoding many such
    images needs.

    One that reads the true caption sets ``reads_captions = True``; ``generate`` then gets a third argument, the
    captions of the images, of which some may be None. One that sees no images, too, sets ``image = None``; ``pixels``
    are then None.

    One that keeps memory of the device between batches may add ``release_memory()``. It is called when the device runs
    out of memory, before a smaller batch.

    One that cannot promise equal captions for equal images and seeds sets ``repeatable = False``. One whose
    ``to_texts`` waits for a server sets ``waits = True`` and bounds the wait itself: its time is not that of a hang.
    """

    #: Preprocessing of ``pixels``.
    image: ImageSpec
    #: Captions per image, of the class or its argument of this name: the default of ``captions`` in the config, which
    #: may state no other number.
    captions: int

    def caption(self, pixels: torch.Tensor, seeds: np.ndarray) -> Sequence[list[str] | NoCaptions | None]:
        """Caption float32 [B, 3, H, W] on the device -> ``captions`` strings for each of the B images.

        ``seeds`` is uint64 [B, captions]. Caption (b, n) must depend on image b and ``seeds[b, n]`` alone, never on
        the other images of the batch, so that a retried shard gets the same captions. Return None for an image whose
        logits are not finite; its row is stored as null and quarantined as ``not_finite``. Return ``NoCaptions`` where
        there is no caption for another reason.
        """
        ...


class Scorer(Protocol):
    """A model that computes named numbers of each sample, on the image, texts, metadata or stored vectors.

    It is named by ``scores: {NAME: {class: package.module:Class}}`` and built like a teacher, as ``Class(device,
    **options)``. ``names`` and ``inputs`` are attributes of the class, since they are known before it is built; the
    config may set others. ``version`` is that of a teacher.

    ``inputs`` are the arguments of ``score``, in this order:

    - ``pixels``: float32 [B, 3, H, W] on the device, the image as a whole, preprocessed by ``image``,
    - ``caption``: B strings, the true captions,
    - ``metadata``: B mappings, the metadata of the samples layer,
    - ``embeddings/TEACHER/images``, ``embeddings/TEACHER/caption`` or ``embeddings/TEACHER/CAPTIONER``: float32
      [B, count, dim] on the device, stored vectors; images are augmented ones,
    - ``captions/CAPTIONER``: B lists of strings.

    Beside ``pixels``, only ``caption`` can be another input. A sample that lacks an input is left out of the batch, and
    its scores are null. Inputs may be changed; outputs are copied before the next call and may reuse their memory.
    """

    #: Names of the scores.
    names: Sequence[str]
    #: What it sees.
    inputs: Sequence[str]
    #: Preprocessing of ``pixels``; needed only with these.
    image: ImageSpec

    def score(self, *inputs: Any) -> torch.Tensor | np.ndarray:
        """Score B samples -> [B, K] with a number for each of K ``names``; [B] for a single one.

        A number that is NaN or infinite is stored as null, and its row quarantined as ``not_finite``. A score must
        depend on its own sample alone, never on the others of the batch.
        """
        ...
