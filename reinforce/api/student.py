"""``reinforce.Student``: a trained model that encodes images and texts, and is exported."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image

from reinforce import settings
from reinforce.api.inputs import PillowTransform, as_rgb
from reinforce.errors import UserError
from reinforce.evaluation.command import build_evaluation
from reinforce.evaluation.encoding import encode_texts, load_encoders
from reinforce.evaluation.model_names import resolve_models, short_name
from reinforce.processes.cores import available_cores
from teachers.fit import fit
from teachers.open_clip.teacher import OpenClipTeacher
from teachers.pixels import to_pixels
from teachers.protocols import ImageSpec
from teachers.runtime.accelerator import Accelerator

if TYPE_CHECKING:
    from reinforce.publishing.model import PublishedModel

#: Images of ``encode_images``: Pillow, uint8 [H, W, 3], encoded bytes, or the path of a file.
ImageLike = Image.Image | np.ndarray | bytes | str | os.PathLike[str]


class Student:
    """A trained dual encoder; ``Student.load`` makes one.

    Attributes:
        name: the name that it was loaded by.
        dim: length of its embeddings.
        image: size and normalisation of its images.
        logit_scale: by which cosines become logits.
        preprocess: transform of an image to float32 [3, H, W], converted as ``encode_images`` does.
        tokenizer: N texts -> int64 [N, context].
    """

    def __init__(self, name: str, pretrained: str | None, encoder: OpenClipTeacher, accelerator: Accelerator) -> None:
        assert encoder.image is not None
        self.name, self.dim, self.logit_scale = name, encoder.dim, float(encoder.logit_scale or 1.0)
        self.image: ImageSpec = encoder.image
        self.preprocess, self.tokenizer = PillowTransform(encoder.image), encoder.tokenize
        self._pretrained, self._encoder, self._accelerator = pretrained, encoder, accelerator

    @classmethod
    @settings.checked_arguments
    def load(
        cls,
        name: settings.Address,
        *,
        pretrained: str | None = None,
        device: str = "auto",
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    ) -> Student:
        """Load a student from the output of a training run, a folder or URI of open_clip's files, or the Hub.

        ``name`` is such a folder or URI, ``hf-hub:ORG/REPO``, or ``NAME,TAG`` of open_clip (or ``NAME`` with the tag
        ``pretrained``). Raises UserError if there is no model, or it cannot be loaded on the device.
        """
        with resolve_models([name], pretrained) as specs:
            [(_, encoder, accelerator)] = load_encoders(specs, device, precision, available_cores())
        if not isinstance(encoder, OpenClipTeacher):
            raise UserError(f"{name} is no model of open_clip with an image and a text tower. Load another.")
        return cls(name, pretrained, encoder, accelerator)

    def encode_images(self, images: ImageLike | Sequence[ImageLike], batch: int = 64) -> torch.Tensor:
        """Encode N images -> float32 [N, dim] on the CPU, unit norm; a single image gives [1, dim].

        Images are Pillow's, uint8 [H, W, 3], encoded bytes or paths. All are converted by one policy, that of datasets:
        EXIF orientation is applied, transparency is over white, and 16 bits are scaled. They are resized as the model's
        evaluation does. Raises UserError for one that cannot be decoded.
        """
        several = [images] if isinstance(images, (Image.Image, np.ndarray, bytes, str, os.PathLike)) else images
        rows = []
        for number, given in enumerate(_checked_list("images", several)):
            where, image = f"image {number}", given
            if isinstance(given, (str, os.PathLike)):
                where = os.fspath(given)
                try:
                    image = Path(where).read_bytes()
                except (OSError, ValueError) as error:  # ValueError: of a path with a null character
                    reason = getattr(error, "strerror", None) or error
                    raise UserError(f"{where}: {reason}. Give the path of an image.") from error
            rows.append(fit(as_rgb(image, where), self.image))
        parts = [torch.empty(0, self.dim)]
        for start in range(0, len(rows), _checked_batch(batch)):
            pixels = self._accelerator.put(torch.from_numpy(np.stack(rows[start : start + batch])))
            parts.append(self._encoder.encode_images(to_pixels(pixels, self.image)).float().cpu())
        return torch.cat(parts)

    def encode_texts(self, texts: str | Sequence[str], batch: int = 64) -> torch.Tensor:
        """Encode N texts -> float32 [N, dim] on the CPU, unit norm; a single text gives [1, dim]."""
        several = _checked_list("texts", [texts] if isinstance(texts, str) else texts)
        if wrong := [text for text in several if not isinstance(text, str)]:
            raise UserError(f"texts: want strings, got {wrong[0]!r:.100}")
        if not several:
            return torch.empty(0, self.dim)
        return encode_texts(self._encoder, several, _checked_batch(batch)).cpu()

    @settings.checked_arguments
    def export(
        self,
        target: str,
        output: settings.Address,
        *,
        weights: str | None = None,
        tower: Literal["both", "image"] = "both",
        min_cosine: float = 0.99,
        evaluation: settings.Address | None = None,
    ) -> Any:
        """Write the model for another runtime, as `reinforce export` does: ``target`` is one of its commands.

        ``tower="image"`` leaves the text tower out. ``weights`` is how they are stored, default: the target's first
        way; ``evaluation`` is a YAML config whose ``evaluate`` section has sets on which both models are compared.
        Returns the report. Raises UserError.
        """
        from reinforce.shipping.packages import TARGETS, require_packages

        if target not in TARGETS:
            raise UserError(f"target: there is no {target!r}; there are: {', '.join(TARGETS)}.")
        require_packages(target)
        from reinforce.shipping.export import export_model, load_target
        from reinforce.shipping.targets.base import ExportOptions

        options = ExportOptions(short_name(self.name), weights or load_target(target).weights[0], tower=tower)
        sets = None if evaluation is None else build_evaluation(Path(evaluation))
        with resolve_models([self.name], self._pretrained) as specs:
            return export_model(target, self.name, specs[self.name], output, options, min_cosine, sets)

    @settings.checked_arguments
    def push(
        self,
        repository: str,
        *,
        license: str = "unknown",
        licenses: Mapping[str, str] | None = None,
        private: bool = False,
        force: bool = False,
    ) -> PublishedModel:
        """Publish the student on the Hub as ORG/NAME, with a model card, as `reinforce publish model` does.

        ``licenses`` are those of teachers and captioners by name; ``force`` replaces a card of somebody else. HF_TOKEN
        or `hf auth login` gives access. ``hf-hub:ORG/NAME`` loads it here and in open_clip. Raises UserError, and then
        nothing is written.
        """
        from reinforce.publishing.model import publish_model

        url = repository if "://" in repository else f"hf://{repository}"
        return publish_model(self.name, url, license, licenses, private, force)

    def __repr__(self) -> str:
        return f"Student({self.name!r}, dim={self.dim}, image={self.image.size}, device={self._accelerator.device})"


def _checked_list(name: str, values: Any) -> list[Any]:
    try:
        return list(values)
    except TypeError:
        raise UserError(f"{name}: want a list, got {type(values).__name__}.") from None


def _checked_batch(batch: Any) -> int:
    if not isinstance(batch, int) or batch < 1:
        raise UserError(f"batch: want a number of at least 1, got {batch!r:.100}")
    return batch
