"""Transforms and tokenizers of open_clip, torchvision and transformers, called in one way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from reinforce.errors import UserError
from reinforce.images.policy import ImageRefused, decode, to_rgb
from reinforce.source.config import Limits
from teachers.fit import fit
from teachers.pixels import to_pixels
from teachers.protocols import ImageSpec

#: uint8 [size, size, 3] -> the image of an example.
ImageTransform = Callable[[np.ndarray], Any]
#: n texts -> n entries.
TextTransform = Callable[[Sequence[str]], Sequence[Any]]

_LONGEST = 1_000_000  # tokens; a tokenizer of transformers that does not know its length states a larger number


class PillowTransform:
    """An ``ImageSpec`` as a transform: Pillow image -> float32 [3, height, width]; pickles small.

    Raises UserError for an image without pixels.
    """

    def __init__(self, spec: ImageSpec) -> None:
        self.spec = spec

    def __call__(self, image: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(fit(as_rgb(image, "the image"), self.spec).copy())
        return to_pixels(pixels[None], self.spec)[0]


def as_rgb(image: Any, where: str) -> Image.Image:
    """RGB of an image of Pillow, of uint8 [H, W, 3], or of encoded bytes, by one policy. Raises UserError."""
    try:
        if isinstance(image, bytes):
            return decode(image, Limits())
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise UserError(f"{where}: want uint8 [H, W, 3], got {image.dtype} {[*image.shape]}.")
            image = Image.fromarray(image)
        if isinstance(image, Image.Image):
            return to_rgb(image, Limits())
    except ImageRefused as error:
        raise UserError(f"{where} cannot be decoded ({error}). Leave it out.") from error
    raise UserError(f"{where}: want an image of Pillow, an array, bytes or a path, got {type(image).__name__}.")


def image_transform(image: Any) -> ImageTransform:
    """The function of a transform, an image processor or a processor of transformers. Raises UserError."""
    if image is None:
        return _as_tensor
    if (processor := _processor(image)) is not None:
        return partial(_processed, processor)
    if not callable(image):
        raise UserError(
            f"image: want a function of a Pillow image, such as open_clip's preprocess, or an image processor of "
            f"transformers, got {type(image).__name__}"
        )
    return partial(_transformed, image)


def replay_size(image: Any) -> int | None:
    """The side in pixels of the square images that a transform gives, None if it is not known."""
    if isinstance(image, PillowTransform):
        return image.spec.height if image.spec.height == image.spec.width else None
    if (processor := _processor(image)) is not None:
        stated: list[Any] = [getattr(processor, name, None) for name in ("crop_size", "size")]
    else:
        stated = [getattr(step, "size", None) for step in reversed(getattr(image, "transforms", []))]  # of torchvision
    for size in stated:
        sides = {*size.values()} if hasattr(size, "values") else {*size} if isinstance(size, Sequence) else {size}
        sides -= {None}
        if len(sides) == 1 and isinstance(side := sides.pop(), int):
            return side
    return None


def text_transform(tokenizer: Any, context: int | None) -> TextTransform:
    """The function of a tokenizer, or of a processor of transformers. Raises UserError."""
    if tokenizer is None:
        return list
    tokenizer = getattr(tokenizer, "tokenizer", None) if hasattr(tokenizer, "image_processor") else tokenizer
    if not callable(tokenizer):
        raise UserError(
            f"tokenizer: want one of open_clip or transformers, called with a list of texts, got "
            f"{type(tokenizer).__name__}"
        )
    if not hasattr(tokenizer, "pad_token"):
        return partial(_tokens, tokenizer)
    length = context or int(tokenizer.model_max_length)
    if length > _LONGEST:
        raise UserError("tokenizer: it does not state its length; set `context` to that of the model, in tokens.")
    return partial(_padded_tokens, tokenizer, length)


# Functions of modules, so that workers of a DataLoader can be started with them.


def _as_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def _transformed(transform: Any, pixels: np.ndarray) -> Any:
    return transform(Image.fromarray(pixels))


def _processed(processor: Any, pixels: np.ndarray) -> Any:
    return processor(images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]


def _tokens(tokenizer: Any, texts: Sequence[str]) -> Any:
    return tokenizer(list(texts))


def _padded_tokens(tokenizer: Any, length: int, texts: Sequence[str]) -> list[dict[str, torch.Tensor]]:
    found = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return [{name: values[row] for name, values in found.items()} for row in range(len(texts))]


def _processor(image: Any) -> Any:
    """The image processor of transformers that something is or has; None if it is something else."""
    image = getattr(image, "image_processor", image)
    return image if hasattr(image, "model_input_names") and hasattr(image, "preprocess") else None
