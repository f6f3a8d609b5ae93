"""Sampling of captions on an accelerator, without waiting for it more than once a step.

Tokens, numbers and the ends of texts stay on the device. After each step the host reads one byte for each row. It
decides from them which images enter in place of texts that have ended, and at last how many rows the next step has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from teachers.decoding.rules import Decoder, DecodingRules
from teachers.decoding.sampling import TokenChooser
from teachers.decoding.schedule import Entry, Schedule
from teachers.fast_paths.recompilation import Compiler
from teachers.fast_paths.step_graphs import Step
from teachers.runtime.accelerator import upload

Tensor = torch.Tensor
#: Bits of a row's byte after a step: its text has ended; its token is not yet decided.
_DONE, _OPEN = 1, 2


class DeviceDecoder(Decoder, Protocol):
    """A decoder whose steps wait for nothing."""

    def room(self, images: int, captions: int) -> tuple[int, int]:
        """Number of rows that steps have for so many images, and of images that these rows may belong to."""
        ...

    def enter(self, entry: Entry) -> None:
        """Begin the captions of images of the batch, in rows and places that are free."""
        ...

    def padded(self, rows: int) -> int:
        """Number of rows that steps have for so many rows."""
        ...

    def step(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Tokens int64 [rows, any length] -> logits [rows, vocabulary] after the tokens at ``position``, int64 [rows].

        The start token comes first. A row that has ended has the position after the last. ``rows`` is that of ``room``
        or ``padded``. Called by the functions that ``launch`` runs.
        """
        ...

    def launch(self, step: Step, longest: int) -> None:
        """Run ``step``, which reads and writes tensors that stay where they are while ``capacity`` is the same.

        No text that has not ended has more than ``longest`` new tokens.
        """
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
        self.advance: Callable[..., None] = self._advance
        self._mask = rules.mask()
        self._padding = int(rules.impossible.int().argmax())  # impossible, also after the repetition penalty

    def sample(self, decoder: DeviceDecoder, drawn: npt.NDArray[np.float64]) -> list[list[list[int]] | None]:
        """Decode with ``drawn`` [images, captions, length] -> the new tokens of each image's captions.

        Token i of caption n of image b is chosen by the number ``drawn[b, n, i]``. None for an image whose logits are
        not finite. The decoder holds no image that has entered.
        """
        images, captions, length = drawn.shape
        rows, places = decoder.room(images, captions)
        schedule = Schedule(images, captions, rows, places)
        state = self.reserve(max(rows, decoder.capacity))
        state.start(drawn.reshape(-1, length), self._rules.start, self._padding)
        while length:
            if (entry := schedule.enter()) is not None:
                state.enter(entry, rows, self._padding)
                decoder.enter(entry)
            decoder.launch(partial(self._step, decoder, state, rows), schedule.longest)
            flags = state.read_flags(rows)
            if undecided := int((flags & _OPEN).astype(bool).sum()):
                self._decide(state, rows, undecided)
            ended = (flags & _DONE).astype(bool)
            schedule.advance(ended)
            if schedule.waiting:
                continue
            if ended.all():
                break
            smaller = decoder.padded(rows - int(ended.sum()))
            if 4 * smaller <= 3 * rows:  # moving the caches costs about a step
                kept, used = state.compact(rows, smaller)
                decoder.select_rows(kept, used)
                rows = smaller
        return state.texts(rows, images, captions, self._rules.end)

    def release(self) -> None:
        """Release the memory of all batches."""
        self._state = None

    def reserve(self, rows: int) -> _State:
        """Allocate the tensors of so many rows."""
        if self._state is None or self._state.capacity != rows:
            self._state = None  # before the new one is allocated
            vocabulary = len(self._rules.impossible) if self._choose.keeps_probabilities else 0
            self._state = _State(rows, self._rules.max_tokens, vocabulary, self._rules.impossible.device)
        return self._state

    def compile(self, compiler: Compiler) -> None:
        """Compile what follows the logits of a step."""
        self.advance = compiler.for_any_rows(self._advance)

    def _step(self, decoder: DeviceDecoder, state: _State, rows: int) -> None:
        """Choose the next token of each row. Reads and writes ``state`` alone, so that it can be a CUDA graph."""
        logits = decoder.step(state.tokens[:rows], state.position[:rows])
        self.advance(logits, *(values[:rows] for values in state.of_step()))

    def _advance(
        self,
        logits: Tensor,
        tokens: Tensor,
        drawn: Tensor,
        done: Tensor,
        broken: Tensor,
        position: Tensor,
        flags: Tensor,
        probabilities: Tensor,
    ) -> None:
        """Choose the next tokens from logits [rows, vocabulary] and write them to the rows of a state's tensors."""
        end, length = self._rules.end, drawn.shape[1] - 1
        logits = self._rules.apply_at(logits, tokens[:, 1:], position, self._mask)
        number = drawn.gather(1, position[:, None]).squeeze(1)
        chosen, undecided = self._choose.without_waiting(logits, number, probabilities)
        lost = ~logits.amax(-1).isfinite() & ~done
        broken.logical_or_(lost)
        lost = lost | done
        chosen = chosen.masked_fill(lost, end)
        position.add_(1)
        tokens.scatter_(1, position[:, None], chosen[:, None])
        undecided = torch.zeros_like(done) if undecided is None else undecided & ~lost
        done.logical_or_(((chosen == end) | (position == length)) & ~undecided)
        position.masked_fill_(done, length)
        flags.copy_(done.to(torch.uint8) * _DONE + undecided.to(torch.uint8) * _OPEN)

    def _decide(self, state: _State, rows: int, undecided: int) -> None:
        """Choose the tokens that the last step left open, in so many rows."""
        flags = state.flags[:rows] & _OPEN
        where = flags.sort(descending=True, stable=True).indices[:undecided]
        position = state.position.index_select(0, where)
        drawn = state.drawn.index_select(0, where).gather(1, position[:, None] - 1).squeeze(1)
        chosen = self._choose.remaining(state.probabilities.index_select(0, where), drawn)
        tokens = state.tokens.index_select(0, where).scatter(1, position[:, None], chosen[:, None])
        state.tokens.index_copy_(0, where, tokens)
        done = (chosen == self._rules.end) | (position == state.length)
        state.done.index_copy_(0, where, done)
        state.position.index_copy_(0, where, position.masked_fill(done, state.length))


class _State:
    """Tensors of at most ``capacity`` rows, by row or, in the order of the captions, of texts that have ended.

    Rows whose texts have ended have the position ``length``. Their next token goes to a column of ``tokens`` after the
    last, so that the text stays.
    """

    def __init__(self, capacity: int, length: int, vocabulary: int, device: torch.device) -> None:
        self.capacity, self.length = capacity, length
        self.tokens = torch.zeros(capacity, length + 2, dtype=torch.int64, device=device)
        self.drawn = torch.ones(capacity, length + 1, dtype=torch.float64, device=device)
        self.caption = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.done = torch.ones(capacity, dtype=torch.bool, device=device)
        self.broken = torch.zeros_like(self.done)
        self.position = torch.zeros_like(self.caption)
        self.flags = torch.zeros(capacity, dtype=torch.uint8, device=device)
        self.probabilities = torch.zeros(capacity, vocabulary, device=device)

    def of_step(self) -> tuple[Tensor, ...]:
        """The tensors that ``advance`` of a sampler reads and writes."""
        return self.tokens, self.drawn, self.done, self.broken, self.position, self.flags, self.probabilities

    def start(self, drawn: npt.NDArray[np.float64], start: int, padding: int) -> None:
        """Begin without texts, with ``drawn`` [captions, length]. Tokens are ``start`` and then ``padding``."""
        count, device = len(drawn), self.drawn.device
        self._drawn = upload(drawn, device)
        self._texts = torch.zeros(count + 1, self.length + 1, dtype=torch.int64, device=device)  # the last is of none
        self._lost = torch.zeros(count + 1, dtype=torch.bool, device=device)
        self.tokens.fill_(padding)
        self.tokens[:, 0] = start
        self.caption.fill_(count)
        self.done.fill_(True)
        self.broken.zero_()
        self.position.fill_(self.length)

    def enter(self, entry: Entry, rows: int, padding: int) -> None:
        """Begin the texts of an entry in place of those that have ended in its rows."""
        self._store(rows)
        there, captions = upload(entry.rows, self.done.device), upload(entry.captions, self.done.device)
        self.tokens[:, 1:].index_fill_(0, there, padding)
        self.drawn[:, :-1].index_copy_(0, there, self._drawn.index_select(0, captions))
        self.caption.index_copy_(0, there, captions)
        for values in (self.done, self.broken, self.position):
            values.index_fill_(0, there, 0)

    def read_flags(self, rows: int) -> npt.NDArray[np.uint8]:
        """The byte of each row. Waits for the device."""
        flags: npt.NDArray[np.uint8] = self.flags[:rows].cpu().numpy()
        return flags

    def compact(self, rows: int, smaller: int) -> tuple[Tensor, Tensor]:
        """Keep ``smaller`` rows, those that have not ended among them -> their indices, and whether they have not."""
        self._store(rows)
        order = self.done[:rows].to(torch.uint8).sort(stable=True).indices[:smaller]
        for values in (self.tokens, self.drawn, self.caption, self.done, self.broken, self.position):
            values[:smaller] = values.index_select(0, order)
        return order, ~self.done[:smaller]

    def texts(self, rows: int, images: int, captions: int, end: int) -> list[list[list[int]] | None]:
        """The texts of each image's captions, None where one was broken."""
        self._store(rows)
        stored = torch.cat([self._texts[:-1, 1:], self._lost[:-1, None]], dim=1).cpu().numpy()
        texts, lost = stored[:, :-1], np.any(stored[:, -1].reshape(images, captions), axis=1, keepdims=True)
        ends = texts == end
        lengths = np.where(ends.any(1), ends.argmax(1), self.length)
        rows_of = [text[:length] for text, length in zip(texts.tolist(), lengths.tolist(), strict=True)]
        return [None if lost[i, 0] else rows_of[i * captions : (i + 1) * captions] for i in range(images)]

    def _store(self, rows: int) -> None:
        self._texts.index_copy_(0, self.caption[:rows], self.tokens[:rows, :-1])
        self._lost.index_copy_(0, self.caption[:rows], self.broken[:rows])
