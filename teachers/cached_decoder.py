"""Rows of words that grow on the key/value cache of a transformers model."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from teachers.device import Accelerator


class CachedDecoder:
    """A ``Decoder`` of rows that begin with a prompt: each word by a pass over the last one, on the cache of the rest.

    ``ends`` are the tokens that end a text: the first stands for them all. ``context`` are arguments of every pass, a
    row each. ``positions`` is None where the model counts by itself, else the position of the first word and the
    shape before [rows, 1] in which the model wants them.
    """

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
        self._first = output.logits[:, -1]
        self._name = "cache" if "cache" in output else "past_key_values"  # renamed by transformers 5
        self._cache = output[self._name]

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """A start token and the words so far, int64 [rows, 1 + words] -> [rows, vocabulary]."""
        words = tokens.shape[1] - 1
        if words == 0:
            return merge_end_tokens(self._first, self._ends)
        arguments = {self._name: self._cache, **self._context}
        if self.positions is not None:
            first, shape = self.positions
            arguments["position_ids"] = torch.full((*shape, len(tokens), 1), first + words - 1, device=tokens.device)
        with self._accelerator.forward():
            logits = self._model(input_ids=tokens[:, -1:], use_cache=True, **arguments).logits
        return merge_end_tokens(logits[:, -1], self._ends)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Go on with these rows: int64 indices; one may be taken several times."""
        rows = rows.to(self._first.device)
        self._cache.reorder_cache(rows)
        self._context = {name: values[rows] for name, values in self._context.items()}

    def row_bytes(self) -> int:
        """Bytes of one row's cache."""
        tensors = (value for layer in self._cache for value in layer if isinstance(value, torch.Tensor))
        return sum(value[0].numel() * value.element_size() for value in tensors if value.ndim > 1)


def merge_end_tokens(logits: torch.Tensor, ends: tuple[int, ...]) -> torch.Tensor:
    """Float32 [..., vocabulary] in which the first end is as probable as all were together; the others stay."""
    logits = logits.float()
    if len(ends) > 1:
        logits[..., ends[0]] = logits[..., list(ends)].logsumexp(-1)
    return logits
