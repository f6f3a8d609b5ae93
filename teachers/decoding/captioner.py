"""What captioners that decode next-token logits in this process have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from teachers.decoding.decode import BEAMS, draw
from teachers.decoding.device_sampling import DeviceSampler
from teachers.decoding.rules import DecodingRules
from teachers.decoding.sampling import TokenChooser
from teachers.runtime.accelerator import Accelerator
from teachers.spec import CaptionerSpec


class DecodingCaptioner:
    """A ``Captioner`` of a model with the tokens ``start`` and ``end`` and a mask of ``impossible`` ones, bool
    [vocabulary].

    A derived class decodes the tokens of images in ``_generate``, and makes texts of tokens in ``_text``. Steps with
    ``on_device`` are sampled there.
    """

    def __init__(
        self, spec: CaptionerSpec, accelerator: Accelerator, start: int, end: int, impossible: torch.Tensor,
        on_device: bool,
    ) -> None:  # fmt: skip
        self.captions, self._spec, self._accelerator = spec.captions, spec, accelerator
        self._rules = DecodingRules(
            start=start,
            end=end,
            impossible=impossible.to(accelerator.device),
            min_tokens=spec.min_length,
            max_tokens=spec.max_length - 2,  # start and end count
            repetition_penalty=spec.repetition_penalty,
        )
        samples = on_device and spec.strategy not in BEAMS
        self._sampler = DeviceSampler(self._rules, TokenChooser(spec)) if samples else None

    @torch.inference_mode()
    def caption(self, pixels: torch.Tensor, seeds: npt.NDArray[np.uint64]) -> list[list[str] | None]:
        """Pixels float32 [B, 3, H, W] and seeds [B, captions] -> captions of each image, None if its logits are NaN.

        Caption (b, n) is a function of image b and seeds[b, n], or of image b alone without sampling, up to the
        rounding of matrix products, which may depend on the batch. Raises ValueError if the logits of all of several
        images are NaN.
        """
        return self.to_texts(self.generate(pixels, seeds))

    def draw(self, seeds: npt.NDArray[np.uint64]) -> npt.NDArray[Any]:
        """What ``generate`` takes in place of seeds; needs no accelerator."""
        return draw(seeds, self._rules, self._spec)

    @torch.inference_mode()
    def generate(self, pixels: torch.Tensor, seeds: npt.NDArray[Any]) -> list[list[list[int]] | None]:
        """As ``caption``, but the tokens of each caption between start and end. ``seeds`` may be those of ``draw``."""
        if seeds.shape[:2] != (len(pixels), self.captions):
            raise ValueError(f"expected seeds of shape {(len(pixels), self.captions)}, got {seeds.shape}")
        return self._generate(pixels, seeds)

    def to_texts(self, captions: Sequence[list[list[int]] | None]) -> list[list[str] | None]:
        """Turn the tokens of ``generate`` into texts; needs no accelerator."""
        return [None if tokens is None else [self._text(text) for text in tokens] for tokens in captions]

    def _generate(self, pixels: torch.Tensor, seeds: npt.NDArray[Any]) -> list[list[list[int]] | None]:
        raise NotImplementedError

    def _text(self, tokens: list[int]) -> str:
        raise NotImplementedError
