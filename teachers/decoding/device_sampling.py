"""Sampling of captions on an accelerator, without waiting for it more than once a step.

Tokens, numbers and the ends of texts stay on the device. After each step the host reads one byte for each row, and
decides from it only how many rows the next step has.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from teachers.decoding.choosing import TokenChooser
from teachers.decoding.rules import Decoder, DecodingRules
from teachers.device.accelerator import upload
from teachers.device.step_graphs import Step

Tensor = torch.Tensor
#: Bits of a row's byte after a step: its text has ended; its token is not yet decided.
_DONE, _OPEN = 1, 2


class DeviceDecoder(Decoder, Protocol):
    """A decoder whose steps wait for nothing."""

    def padded(self, rows: int) -> int:
        """Number of rows that steps have for so many rows."""
        ...

    def step(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Tokens int64 [rows, length + 1] -> logits [rows, vocabulary] after the token at ``position``, int64 [1].

        The start token comes first. ``rows`` is ``padded(rows)``. Called by the functions that ``launch`` runs.
        """
        ...

    def launch(self, step: Step) -> None:
        """Run ``step``, which reads and writes tensors that stay where they are while ``capacity`` is the same."""
        ...

    def select_rows(self, rows: Tensor, used: Tensor | None = None) -> None:
        """As ``Decoder.select_rows``; ``used``, bool [rows], are those whose logits will be used, by default all."""
        ...

    @property
    def capacity(self) -> int:
        """Largest number of rows of the decoder's tensors. Its launches are new when it changes."""
        ...


class DeviceSampler:
    """Samples texts by ``choose`` and the numbers of each row. Its tensors are kept between batches."""

    def __init__(self, rules: DecodingRules, choose: TokenChooser) -> None:
        self._rules, self._choose = rules, choose
        self._state: _State | None = None
        self._masks = rules.masks()
        self._padding = int(rules.impossible.int().argmax())  # impossible, whatever the repetition penalty makes of it

    def sample(self, decoder: DeviceDecoder, drawn: npt.NDArray[np.float64]) -> list[list[list[int]] | None]:
        """Decode with ``drawn`` [images, captions, length] -> the new tokens of each image's captions.

        Token i of caption n of image b is chosen by the number ``drawn[b, n, i]``. None for an image whose logits are
        not finite. The decoder has one row per image.
        """
        images, captions, length = drawn.shape
        rows, count = decoder.padded(images * captions), images * captions
        state = self._reserve(max(rows, decoder.capacity), length)
        state.start(drawn.reshape(count, length), rows, self._rules.start, self._padding)
        decoder.select_rows(torch.arange(images, device=state.done.device).repeat_interleave(captions))
        for _ in range(length):
            decoder.launch(partial(self._step, decoder, state, rows))
            flags = state.read_flags(rows)
            if undecided := int((flags & _OPEN).astype(bool).sum()):
                self._decide(state, rows, undecided)
            active = rows - int((flags & _DONE).sum())
            if not active:
                break
            smaller = decoder.padded(active)
            if 4 * smaller <= 3 * rows:  # moving the caches costs about a step
                kept, used = state.compact(rows, smaller)
                decoder.select_rows(kept, used)
                rows = smaller
        return state.texts(rows, images, captions, self._rules.end)

    def release(self) -> None:
        """Release the memory of all batches."""
        self._state = None

    def _reserve(self, rows: int, length: int) -> _State:
        if self._state is None or self._state.capacity != rows or self._state.length != length:
            self._state = None  # before the new one is allocated
            vocabulary = len(self._rules.impossible) if self._choose.keeps_probabilities else 0
            self._state = _State(rows, length, vocabulary, self._rules.impossible.device)
        return self._state

    def _step(self, decoder: DeviceDecoder, state: _State, rows: int) -> None:
        """Choose the next token of each row. Reads and writes ``state`` alone, so that it can be a CUDA graph."""
        position, end = state.position, self._rules.end
        tokens, done = state.tokens[:rows], state.done[:rows]
        logits = self._rules.apply_at(decoder.step(tokens, position), tokens[:, 1:], position, self._masks)
        drawn = state.drawn[:rows].index_select(1, position).squeeze(1)
        chosen, undecided = self._choose.without_waiting(logits, drawn, state.probabilities[:rows])
        broken = ~logits.amax(-1).isfinite() & ~done
        state.broken[:rows].logical_or_(broken)
        chosen = chosen.masked_fill(done | broken, end)
        position.add_(1)
        tokens.index_copy_(1, position, chosen[:, None])
        undecided = torch.zeros_like(done) if undecided is None else undecided & ~(done | broken)
        done.logical_or_((chosen == end) & ~undecided)
        state.flags[:rows] = done.to(torch.uint8) * _DONE + undecided.to(torch.uint8) * _OPEN

    def _decide(self, state: _State, rows: int, undecided: int) -> None:
        """Choose the tokens that the last step left open, in so many rows."""
        flags = state.flags[:rows] & _OPEN
        where = flags.sort(descending=True, stable=True).indices[:undecided]
        drawn = state.drawn.index_select(0, where).index_select(1, state.position - 1).squeeze(1)
        chosen = self._choose.remaining(state.probabilities.index_select(0, where), drawn)
        column = torch.arange(state.tokens.shape[1], device=where.device) == state.position
        state.tokens.index_copy_(0, where, state.tokens.index_select(0, where).where(~column, chosen[:, None]))
        state.done.index_copy_(0, where, chosen == self._rules.end)


class _State:
    """Tensors of at most ``capacity`` rows, by row or, in the order of the captions, of texts that have ended."""

    def __init__(self, capacity: int, length: int, vocabulary: int, device: torch.device) -> None:
        self.capacity, self.length = capacity, length
        self.tokens = torch.zeros(capacity, length + 1, dtype=torch.int64, device=device)
        self.drawn = torch.ones(capacity, length, dtype=torch.float64, device=device)
        self.caption = torch.full((capacity,), capacity, device=device)
        self.done = torch.ones(capacity, dtype=torch.bool, device=device)
        self.broken = torch.zeros_like(self.done)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.flags = torch.zeros(capacity, dtype=torch.uint8, device=device)
        self.probabilities = torch.zeros(capacity, vocabulary, device=device)
        self._texts = torch.zeros(capacity + 1, length + 1, dtype=torch.int64, device=device)  # the last is of padding
        self._lost = torch.zeros(capacity + 1, dtype=torch.bool, device=device)

    def start(self, drawn: npt.NDArray[np.float64], rows: int, start: int, padding: int) -> None:
        """Begin with rows that use ``drawn`` [captions, length], and with padding up to ``rows``, which has ended.

        Tokens are ``start`` and then ``padding``.
        """
        count = len(drawn)
        self.tokens.fill_(padding)
        self.tokens[:, 0] = start
        self.drawn[:count] = upload(drawn, self.drawn.device)
        places = torch.arange(rows, device=self.drawn.device)
        self.caption[:rows] = places.masked_fill(places >= count, self.capacity)
        self.done[:rows] = places >= count
        self.broken.zero_()
        self.position.zero_()

    def read_flags(self, rows: int) -> npt.NDArray[np.uint8]:
        """The byte of each row. Waits for the device."""
        flags: npt.NDArray[np.uint8] = self.flags[:rows].cpu().numpy()
        return flags

    def compact(self, rows: int, smaller: int) -> tuple[Tensor, Tensor]:
        """Keep ``smaller`` rows, those that have not ended among them -> their indices, and whether they have not."""
        self._store(rows)
        order = self.done[:rows].to(torch.uint8).sort(stable=True).indices[:smaller]
        for values in (self.tokens, self.drawn, self.caption, self.done, self.broken):
            values[:smaller] = values.index_select(0, order)
        return order, ~self.done[:smaller]

    def texts(self, rows: int, images: int, captions: int, end: int) -> list[list[list[int]] | None]:
        """The texts of each image's captions, None where one was broken."""
        self._store(rows)
        count = images * captions
        stored = torch.cat([self._texts[:count, 1:], self._lost[:count, None]], dim=1).cpu().numpy()
        texts, lost = stored[:, :-1], np.any(stored[:, -1].reshape(images, captions), axis=1, keepdims=True)
        ends = texts == end
        lengths = np.where(ends.any(1), ends.argmax(1), self.length)
        rows_of = [text[:length] for text, length in zip(texts.tolist(), lengths.tolist(), strict=True)]
        return [None if lost[i, 0] else rows_of[i * captions : (i + 1) * captions] for i in range(images)]

    def _store(self, rows: int) -> None:
        self._texts.index_copy_(0, self.caption[:rows], self.tokens[:rows])
        self._lost.index_copy_(0, self.caption[:rows], self.broken[:rows])
