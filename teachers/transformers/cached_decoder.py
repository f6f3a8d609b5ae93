"""Decoding on the key/value cache of a transformers model."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from teachers.decoding.schedule import Entry
from teachers.fast_paths.step_graphs import Step, decoding_kernels
from teachers.runtime.accelerator import Accelerator, upload


class CachedDecoder:
    """A ``rules.Decoder`` whose rows begin with a prompt. Each step is a forward pass over the newest token alone.

    ``ends`` are the end tokens, merged into the first. ``context`` are arguments of every pass with one row each.
    ``positions`` is None if the model counts positions itself, else the position of the first new token and the
    shape in front of [rows, 1] that the model expects.
    """

    ahead = 0  # all rows get a token in each step

    def __init__(
        self,
        model: Any,
        accelerator: Accelerator,
        prompt: dict[str, Any],
        ends: tuple[int, ...],
        context: dict[str, torch.Tensor] | None = None,
        positions: tuple[int, tuple[int, ...]] | None = None,
    ) -> None:
        self.positions = positions
        self._model, self._accelerator, self._ends, self._context = model, accelerator, ends, context or {}
        only_last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        with accelerator.forward():
            output = model(**prompt, **self._context, **only_last, use_cache=True)
        self._logits, self._count = output.logits[:, -1], 0  # of the prompt's last token; new tokens in the cache
        self._cache_name = "cache" if "cache" in output else "past_key_values"  # renamed by transformers 5
        self._cache = output[self._cache_name]

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Start token and new tokens so far, int64 [rows, 1 + new tokens] -> float32 [rows, vocabulary]."""
        count = tokens.shape[1] - 1
        if count == 0:
            return merge_end_tokens(self._logits, self._ends)
        arguments = {self._cache_name: self._cache, **self._context}
        if self.positions is not None:
            first, shape = self.positions
            arguments["position_ids"] = torch.full((*shape, len(tokens), 1), first + count - 1, device=tokens.device)
        with self._accelerator.forward():
            logits = self._model(input_ids=tokens[:, -1:], use_cache=True, **arguments).logits
        return merge_end_tokens(logits[:, -1], self._ends)

    @staticmethod
    def room(images: int, captions: int) -> tuple[int, int]:
        """Number of rows and of images in them: all at once, because their texts grow together."""
        return images * captions, images

    def enter(self, entry: Entry) -> None:
        """Begin the captions of all images."""
        self.select_rows(upload(entry.place_of, self._logits.device))

    @staticmethod
    def padded(rows: int) -> int:
        """Number of rows that steps have for so many rows: the same."""
        return rows

    @property
    def capacity(self) -> int:
        """None is reserved: arrays grow with the text."""
        return 0

    def launch(self, step: Step, longest: int) -> None:
        """Run a step, which calls ``step`` once."""
        with decoding_kernels(self._accelerator.device):
            step()
        self._count += 1

    def run(self, kind: str, size: int, step: Step) -> None:
        """Run other work between steps."""
        with decoding_kernels(self._accelerator.device):
            step()

    def step(self, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """As ``device_sampling.DeviceDecoder.step``."""
        return self.next_logits(tokens[:, : self._count + 1])

    def select_rows(self, rows: torch.Tensor, used: torch.Tensor | None = None) -> None:
        """Continue with these rows, int64 indices on the device. A row may be selected several times."""
        self._cache.reorder_cache(rows)
        if not self._count:
            self._logits = self._logits[rows]
        self._context = {name: values[rows] for name, values in self._context.items()}

    def row_bytes(self) -> int:
        """Bytes of one row's cache."""
        tensors = (value for layer in self._cache for value in layer if isinstance(value, torch.Tensor))
        return sum(value[0].numel() * value.element_size() for value in tensors if value.ndim > 1)


def merge_end_tokens(logits: torch.Tensor, ends: tuple[int, ...]) -> torch.Tensor:
    """Logits [..., vocabulary] -> float32, with the total probability of all end tokens in the first of them.

    The logits of the other end tokens stay as they are; the decoding rules exclude them.
    """
    logits = logits.float()
    if len(ends) > 1:
        logits[..., ends[0]] = logits[..., list(ends)].logsumexp(-1)
    return logits
