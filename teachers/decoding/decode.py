"""Decoding of captions from a model's next-token logits by the config's ``strategy``, for captioners of any library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from teachers.decoding.beams import BeamOptions, beam_search
from teachers.decoding.device_sampling import DeviceDecoder, DeviceSampler
from teachers.decoding.rules import Decoder, DecodingRules, compact
from teachers.decoding.sampling import TokenChooser, uniforms
from teachers.runtime.accelerator import Accelerator
from teachers.spec import CaptionerSpec

#: Logits [rows, vocabulary] and float64 [rows] in (0, 1] -> tokens [rows].
Choose = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
BEAMS = ("beams", "diverse_beams")


def draw(seeds: npt.NDArray[np.uint64], rules: DecodingRules, spec: CaptionerSpec) -> npt.NDArray[Any]:
    """What ``decode`` takes in place of seeds [images, captions]: numbers [images, captions, tokens] if it samples."""
    if spec.strategy in BEAMS:
        return seeds
    if spec.strategy == "greedy":
        return np.ones((*seeds.shape, rules.max_tokens))
    return uniforms(seeds.reshape(-1), rules.max_tokens).reshape(*seeds.shape, rules.max_tokens)


def decode(
    decoder: Decoder | DeviceDecoder,
    rules: DecodingRules,
    spec: CaptionerSpec,
    seeds: npt.NDArray[Any],
    sampler: DeviceSampler | None = None,
) -> list[list[list[int]] | None]:
    """Decode the captions of a batch with one row per image and seeds [images, captions] -> their new tokens.

    ``seeds`` may be the result of ``draw``. With sampling, caption (b, n) is a function of image b and ``seeds[b, n]``,
    otherwise of image b alone, up to the rounding of matrix products. An image whose logits are not finite gives None.
    Raises ValueError if that happens to every image of several, which points to the model.

    ``sampler`` is used in place of ``sample`` and needs a ``DeviceDecoder``. Texts then differ by rounding alone.
    """
    images, captions = seeds.shape[:2]
    if spec.strategy in BEAMS:
        groups, diversity = (spec.groups, spec.diversity) if spec.strategy == "diverse_beams" else (1, 0.0)
        options = BeamOptions(spec.beams, groups, diversity, spec.length_penalty)
        texts = beam_search(decoder, rules, images, captions, options)
    else:
        drawn = seeds if seeds.ndim > 2 else draw(seeds, rules, spec)
        if sampler is None:
            texts = sample(decoder, rules, TokenChooser(spec), torch.from_numpy(drawn))
        else:
            texts = sampler.sample(decoder, drawn)  # type: ignore[arg-type]
    if images > 1 and not any(texts):
        raise ValueError("next-token logits are not finite: check the weights, or use `precision: bf16` or `fp32`")
    return texts


def sample(decoder: Decoder, rules: DecodingRules, choose: Choose, drawn: torch.Tensor) -> list[list[list[int]] | None]:
    """Decode token by token on a CPU: token i of caption n of image b by ``choose`` with the number ``drawn[b, n, i]``.

    Returns the new tokens of each image's captions, None for an image whose logits are not finite. Rows that have
    ended leave the batch.
    """
    images, captions, _ = drawn.shape
    drawn = drawn.flatten(0, 1)
    tokens = torch.full((len(drawn), 1), rules.start)
    running = np.arange(len(drawn))  # the caption of each row
    texts: list[list[int]] = [[] for _ in running]
    failed = np.zeros(images, bool)
    for step in range(rules.max_tokens):
        rows = tokens if step else tokens[::captions]  # before the first token, the captions of an image share a row
        logits = rules.apply(decoder.next_logits(rows), rows)
        if not step:
            decoder.select_rows(torch.arange(images).repeat_interleave(captions))
            logits = logits.repeat_interleave(captions, dim=0)
        chosen = choose(logits, drawn[:, step])
        broken = ~logits.amax(-1).isfinite()
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        ended, lost = torch.stack([(chosen == rules.end) | broken, broken]).numpy()
        if not ended.any():
            continue
        failed[running[lost] // captions] = True
        for caption, text in zip(running[ended], tokens[torch.from_numpy(ended), 1:-1].tolist(), strict=True):
            texts[caption] = text
        order = compact(~ended)
        running, kept = running[order], torch.from_numpy(order)
        tokens, drawn = tokens[kept], drawn[kept]
        if not len(order):
            break
        decoder.select_rows(kept)
    for caption, text in zip(running, tokens[:, 1:].tolist(), strict=True):
        texts[caption] = text
    return [None if failed[i] else texts[i * captions : (i + 1) * captions] for i in range(images)]


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
