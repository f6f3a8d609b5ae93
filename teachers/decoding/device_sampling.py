"""Sampling of captions on an accelerator, which always has the next step to do.

Tokens, numbers and the ends of texts stay on the device. Of each step the host reads one byte for each row, if the
decoder allows it after the next step was launched. It decides from them which images enter in place of texts that have
ended, and at last how many rows the next step has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from teachers.decoding.sampling import Decoder, DecodingRules, Entry, Schedule, TokenChooser
from teachers.fast_paths.recompilation import Step
from teachers.runtime.accelerator import download, put_into, widest_float

Tensor = torch.Tensor
#: Bits of a row's byte after a step: its text has ended; its token is not yet decided.
_DONE, _OPEN = 1, 2
#: Least rows, of texts that begin and of tokens that are chosen later. Larger numbers are its doubles.
_FEW = 16
#: Many tokens are those of 1 / _MANY of the rows. To wait for a step takes about as long as so many of its rows.
_MANY = 8


class DeviceDecoder(Decoder, Protocol):
    """A decoder whose steps wait for nothing.

    ``ahead`` is the number of steps, 0 or 1, that may be launched before the ends of texts in the one before are known.
    With 1, a row whose position stays repeats its step. ``capacity`` is the largest number of rows of the decoder's
    tensors. Its launches are new when it changes.
    """

    ahead: int
    capacity: int

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

    def run(self, kind: str, size: int, step: Step) -> None:
        """Run other work between steps, the same on the same tensors for equal ``kind`` and ``size``."""
        ...

    def select_rows(self, rows: Tensor, used: Tensor | None = None) -> None:
        """As ``Decoder.select_rows``; ``used``, bool [rows], are those whose logits will be used, by default all."""
        ...


class DeviceSampler:
    """Samples texts by ``choose`` and the numbers of each row. Its tensors are kept between batches."""

    def __init__(self, rules: DecodingRules, choose: TokenChooser) -> None:
        self._rules, self._choose = rules, choose
        self._state: _State | None = None
        self.advance: Callable[..., None] = self._advance  # what follows the logits of a step, which may be compiled
        self._mask = rules.mask()
        self._padding = int(rules.impossible.int().argmax())  # impossible, also after the repetition penalty

    def sample(self, decoder: DeviceDecoder, drawn: npt.NDArray[np.float64]) -> list[list[list[int]] | None]:
        """Decode with ``drawn`` [images, captions, length] -> the new tokens of each image's captions.

        Token i of caption n of image b is chosen by the number ``drawn[b, n, i]``. None for an image whose logits are
        not finite. The decoder holds no image that has entered.
        """
        images, captions, length = drawn.shape
        rows, places = decoder.room(images, captions)
        schedule, drawn = Schedule(images, captions, rows, places), drawn.reshape(-1, length)
        state = self.reserve(max(rows, decoder.capacity))
        state.start(len(drawn), self._rules.start, self._padding)
        flags, ended = _Flags(decoder.ahead), np.zeros(rows, bool)
        while length:
            if (entry := schedule.enter()) is not None:  # texts begin, with the numbers of each
                state.store(rows)
                decoder.enter(entry)
                count = state.put(entry.rows, entry.captions, drawn[entry.captions])
                decoder.run("begin", count, partial(state.begin, count, self._padding))
            decoder.launch(partial(self._step, decoder, state, rows), schedule.longest)
            schedule.launch()
            flags.copies.append(download(state.flags[:rows]))
            while flags.due:
                ended, undecided = flags.next(rows)
                if len(undecided):
                    count = state.put(undecided)
                    decoder.run("decide", count, partial(self._decide, state, count))
                ended = schedule.advance(ended)
            if schedule.waiting:
                continue
            if ended.all():
                break
            smaller = decoder.padded(int((~ended).sum()))
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

    def _step(self, decoder: DeviceDecoder, state: _State, rows: int) -> None:
        """Choose the next token of each row. Reads and writes ``state`` alone, so that it can be a CUDA graph."""
        logits = decoder.step(state.tokens[:rows], state.position[:rows])
        self.advance(logits, *(values[:rows] for values in state.of_step))

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
        if undecided is not None:  # such a row gets no token, and has the same logits again in the next step
            undecided = undecided & ~lost
            chosen = chosen.masked_fill(undecided, self._padding)
        tokens.scatter_(1, (position + 1)[:, None], chosen[:, None])
        position.add_(1 if undecided is None else ~undecided)
        done.logical_or_((chosen == end) | (position == length))
        position.masked_fill_(done, length)
        flags.copy_(done if undecided is None else done * _DONE + undecided * _OPEN)

    def _decide(self, state: _State, count: int) -> None:
        """Choose the next tokens of so many rows that were ``put``, where the last step has left them open."""
        where = state.given[:count]
        position, tokens = state.position.index_select(0, where), state.tokens.index_select(0, where)
        drawn = state.drawn.index_select(0, where).gather(1, position[:, None]).squeeze(1)
        chosen = self._choose.remaining(state.probabilities.index_select(0, where), drawn)
        open_ = state.flags.index_select(0, where) >= _OPEN  # rounding may have closed a nucleus in the repeated step
        position = position + open_
        column = position.where(open_, state.length + 1)[:, None]  # of no text
        state.tokens.index_copy_(0, where, tokens.scatter(1, column, chosen[:, None]))
        done = open_ & ((chosen == self._rules.end) | (position == state.length))
        done = done | state.done.index_select(0, where)
        state.done.index_copy_(0, where, done)
        state.position.index_copy_(0, where, position.masked_fill(done, state.length))


class _Flags:
    """The bytes of the rows after each step, on their way to the host: ``copies``, each with what completes it.

    They are read when ``ahead`` more steps have been launched; at once where many tokens are not yet decided, since
    their rows repeat each step that is launched until they are.
    """

    def __init__(self, ahead: int) -> None:
        self._ahead = ahead
        self.copies: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._decided = np.zeros(0, np.int64)
        self._many = False

    @property
    def due(self) -> bool:
        """Whether the flags of a step are to be read before the next one."""
        return len(self.copies) > (0 if self._many else self._ahead)

    def next(self, rows: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """The rows whose texts have ended, bool [rows of the step], and those whose tokens are to be decided now.

        Waits for that step. ``rows`` is the present number; where it is another one, rows have moved since.
        """
        copy, complete = self.copies.popleft()
        if complete is not None:
            complete.synchronize()
        flags = copy.numpy()
        undecided = (flags & _OPEN) > 0
        self._many = _MANY * int(undecided.sum()) > len(flags)
        undecided[self._decided] = False  # after this step was launched
        where = np.flatnonzero(undecided) if len(flags) == rows else self._decided[:0]  # which are so in the next step
        self._decided = where if self.copies else where[:0]
        return (flags & _DONE) > 0, where


class _State:
    """Tensors of at most ``capacity`` rows, by row or, in the order of the captions, of texts that have ended.

    Rows whose texts have ended have the position ``length``. Their next token goes to a column of ``tokens`` after the
    last, so that the text stays.
    """

    def __init__(self, capacity: int, length: int, vocabulary: int, device: torch.device) -> None:
        self.capacity, self.length = capacity, length
        self.tokens = torch.zeros(capacity, length + 2, dtype=torch.int64, device=device)
        self.drawn = torch.ones(capacity, length + 1, dtype=widest_float(device), device=device)
        self.caption = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.done = torch.ones(capacity, dtype=torch.bool, device=device)
        self.broken = torch.zeros_like(self.done)
        self.position = torch.zeros_like(self.caption)
        self.flags = torch.zeros(capacity, dtype=torch.uint8, device=device)
        self.probabilities = torch.zeros(capacity, vocabulary, device=device)
        #: What ``advance`` of a sampler reads and writes.
        self.of_step = (
            self.tokens, self.drawn, self.done, self.broken, self.position, self.flags, self.probabilities,
        )  # fmt: skip
        self.given = torch.zeros(_doubled(capacity) * (2 + length), dtype=torch.int64, device=device)  # see `put`

    def start(self, count: int, start: int, padding: int) -> None:
        """Begin without texts; ``count`` are to come. Tokens are ``start`` and then ``padding``."""
        device = self.done.device
        self._texts = torch.zeros(count + 1, self.length + 1, dtype=torch.int64, device=device)  # the last is of none
        self._lost = torch.zeros(count + 1, dtype=torch.bool, device=device)
        self.tokens.fill_(padding)
        self.tokens[:, 0] = start
        self.caption.fill_(count)
        self.done.fill_(True)
        self.broken.zero_()
        self.position.fill_(self.length)

    def put(self, *of_rows: npt.NDArray[Any]) -> int:
        """Copy arrays of 64-bit values to ``given``, one after the other, each [n] or [n, any length].

        Returns the number of rows there. On CUDA it is one of a few, for graphs: the last row is repeated.
        """
        n = len(of_rows[0])
        count = _doubled(n) if self.given.device.type == "cuda" else n
        repeated = np.minimum(np.arange(count), n - 1)
        bits = []
        for values in of_rows:
            one = values[repeated]
            if one.dtype.kind == "f" and self.drawn.dtype == torch.float32:  # where the device has nothing wider
                one = one.astype(np.float32).view(np.int32).astype(np.int64)
            bits.append(one.view(np.int64).reshape(-1))
        put_into(self.given, np.concatenate(bits))
        return count

    def begin(self, count: int, padding: int) -> None:
        """Begin so many texts, whose rows, captions and numbers were ``put``, in place of those that have ended."""
        there, captions, drawn = self.given[: count * (2 + self.length)].split([count, count, count * self.length])
        self.tokens[:, 1:].index_fill_(0, there, padding)
        bits = drawn if self.drawn.dtype == torch.float64 else drawn.to(torch.int32)
        self.drawn[:, :-1].index_copy_(0, there, bits.view(self.drawn.dtype).unflatten(0, (count, -1)))
        self.caption.index_copy_(0, there, captions)
        for values in (self.done, self.broken, self.position):
            values.index_fill_(0, there, 0)

    def compact(self, rows: int, smaller: int) -> tuple[Tensor, Tensor]:
        """Keep ``smaller`` rows, those that have not ended among them -> their indices, and whether they have not."""
        self.store(rows)
        order = self.done[:rows].to(torch.uint8).sort(stable=True).indices[:smaller]
        for values in (self.tokens, self.drawn, self.caption, self.done, self.broken, self.position):
            values[:smaller] = values.index_select(0, order)
        return order, ~self.done[:smaller]

    def texts(self, rows: int, images: int, captions: int, end: int) -> list[list[list[int]] | None]:
        """The texts of each image's captions, None where one was broken."""
        self.store(rows)
        stored = torch.cat([self._texts[:-1, 1:], self._lost[:-1, None]], dim=1).cpu().numpy()
        texts, lost = stored[:, :-1], np.any(stored[:, -1].reshape(images, captions), axis=1, keepdims=True)
        ends = texts == end
        lengths = np.where(ends.any(1), ends.argmax(1), self.length)
        rows_of = [text[:length] for text, length in zip(texts.tolist(), lengths.tolist(), strict=True)]
        return [None if lost[i, 0] else rows_of[i * captions : (i + 1) * captions] for i in range(images)]

    def store(self, rows: int) -> None:
        """Store the texts of rows, which others may replace."""
        self._texts.index_copy_(0, self.caption[:rows], self.tokens[:rows, :-1])
        self._lost.index_copy_(0, self.caption[:rows], self.broken[:rows])


def _doubled(count: int) -> int:
    """The least double of ``_FEW`` that is not below a number."""
    return max(_FEW, 1 << (count - 1).bit_length())
