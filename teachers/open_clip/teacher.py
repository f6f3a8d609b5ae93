"""Teachers of open_clip: built-in models, hub models and local folders."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.utils.model import reparameterize_model

from teachers import weights
from teachers.image_encoder import ImageEncoder, unit
from teachers.open_clip import catalog
from teachers.open_clip.building import AUTHORS, FUSED, build, from_authors
from teachers.open_clip.family import stated_preprocess
from teachers.open_clip.text import TextEncoder, keep_residual_in_float32, tokenizer_of
from teachers.pixels import channels
from teachers.protocols import ImageSpec
from teachers.runtime.accelerator import Accelerator
from teachers.spec import ModelSpec, TeacherSpec


class OpenClipEncoder(ImageEncoder):
    """Image and text encoder of an open_clip model that is on its device in eval mode. The model is not changed."""

    def __init__(self, model: Any, image: ImageSpec, tokenizer: Any, accelerator: Accelerator) -> None:
        super().__init__(model, image, accelerator, model.encode_image)
        self._text = TextEncoder(model, copy.copy(tokenizer), accelerator)  # a copy, since TextEncoder modifies it
        self.tokenizer_key = self._text.tokenizer_key

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return self.encode_tokens(self.tokenize(texts))

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """B strings -> tokens, int64 [B, context length] on the CPU. Slow Python code that needs no accelerator."""
        return self._text.tokenize(texts)

    def encode_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens of ``tokenize`` -> [B, dim] float32, unit norm."""
        with self._accelerator.forward():
            return unit(self._text.encode(tokens))


class OpenClipTeacher(OpenClipEncoder):
    """A teacher by its spec (CLIP, SigLIP, MobileCLIP, CoCa, ...), with the model's own preprocessing.

    Raises ValueError or FileNotFoundError for a wrong spec.
    """

    def __init__(self, spec: TeacherSpec, accelerator: Accelerator) -> None:
        model = accelerator.prepare(load_model(spec))
        image = image_spec(open_clip.get_model_preprocess_cfg(model))
        super().__init__(model, image, tokenizer_of(model_name(spec)), accelerator)
        self.logit_scale: float | None = spec.logit_scale or float(model.logit_scale.exp())
        self.dim = int(open_clip.get_model_config(model_name(spec))["embed_dim"])
        if accelerator.device.type == "cuda" or spec.held_weights:
            keep_residual_in_float32(model)
        self._make_fast(model.visual, spec)


def load_model(spec: ModelSpec, image_size: int | None = None) -> Any:
    """Load the model of a spec with its weights, in float32 on the CPU. Never returns random weights.

    ``image_size`` replaces the side of its images in pixels; positional embeddings are interpolated. Training branches
    of a tower are fused where those of the weights are. Raises ValueError for an unknown name or tag, weights trained
    with another activation, a checkpoint whose preprocessing is not stated, and weights that do not fit the model;
    FileNotFoundError for missing files.
    """
    name = model_name(spec)
    pretrained = catalog.weights_name(spec.name, spec.pretrained)
    catalog.check_model(name, pretrained)
    changed = catalog.changed_preprocess(name, pretrained, stated_preprocess(spec))
    preprocess: dict[str, Any] = {}  # that the tag of the weights prescribes
    if name.startswith(catalog.FOLDER_PREFIX):
        path = catalog.folder_weights(name)
    elif name.startswith(catalog.HUB_PREFIX):
        hub = name.removeprefix(catalog.HUB_PREFIX)
        path = _download(name, lambda: open_clip.pretrained.download_pretrained_from_hf(hub))
    elif catalog.is_checkpoint_file(str(pretrained)):
        path = weights.fetch(str(pretrained))
    else:
        preprocess = catalog.tag_config(name, str(pretrained))
        path = _download(f"{name} {pretrained}", lambda: open_clip.download_pretrained(preprocess))
    with _no_random_weights_warning():
        model = build(name, {**preprocess, **changed}, image_size)
    try:
        file = str(weights.as_safetensors(path))
        with safe_open(file, "pt") as content:
            keys = set(content.keys())
        fused = {key.startswith("text") for key in keys if FUSED in key}
        if False in fused:
            model.visual = reparameterize_model(model.visual)
        if True in fused:
            model.text = reparameterize_model(model.text)
        if any(key.startswith(AUTHORS) for key in keys):
            model.load_state_dict(from_authors(load_file(file), model))
        else:
            open_clip.load_checkpoint(model, file, strict=True)
    except SafetensorError as error:
        raise ValueError(f"the weights in {path} cannot be read, copy them again: {error}") from error
    except (RuntimeError, KeyError, AttributeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the weights in {path} do not fit {name}: {reason}") from error
    return model.float()


def random_model(
    name: str,
    preprocess: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    language_model: bool = False,
) -> Any:
    """Build an architecture by open_clip's name or ``local-dir:PATH`` with random weights; see ``building.build``."""
    with _no_random_weights_warning():
        model = build(name, preprocess, image_size, language_model)
    return model.float().eval()


def image_spec(config: dict[str, Any]) -> ImageSpec:
    """Convert open_clip's ``preprocess_cfg`` to an ImageSpec. Raises ValueError if that is not possible."""
    resize = {"shortest": "crop", "squash": "squash"}.get(config["resize_mode"])
    if resize is None:
        raise ValueError(
            f"resize_mode {config['resize_mode']!r} pads images, which is not supported: "
            "set `resize_mode` to shortest or squash in the model's preprocess_cfg"
        )
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))
    bilinear = config["interpolation"] == "bilinear" and (resize == "squash" or height == width)
    return ImageSpec(
        size=height if height == width else (height, width),
        mean=channels(config["mean"]),
        std=channels(config["std"]),
        # open_clip uses bicubic for "random" at inference, and always for crops that are not square
        interpolation="bilinear" if bilinear else "bicubic",
        resize="crop" if resize == "crop" else "squash",
    )


def model_name(spec: ModelSpec) -> str:
    return spec.name if ":" in spec.name else catalog.builtin_name(spec.name)


def _download(name: str, get: Callable[[], str]) -> Path:
    with weights.locked(f"open_clip {name}"):
        return Path(get())


@contextmanager
def _no_random_weights_warning() -> Iterator[None]:
    """Suppress open_clip's warning of random weights while it builds a model whose weights are loaded afterwards."""

    def keep(record: logging.LogRecord) -> bool:
        return "initialized randomly" not in record.getMessage() and "no CLIP weights" not in record.getMessage()

    root = logging.getLogger()  # open_clip logs to the root
    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)
