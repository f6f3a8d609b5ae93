"""Interfaces that all decoding strategies share: a decoder's rows of tokens, and which tokens may come next.

In this package *new tokens* are the tokens of a text without its start and end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from teachers.runtime.accelerator import widest_float
from teachers.spec import CaptionerSpec


class Decoder(Protocol):
    """A language model with the state of a batch of rows. It begins with one row per image, the start token alone."""

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Start token and new tokens so far, int64 [rows, 1 + new tokens] -> logits [rows, vocabulary]."""
        ...

    def select_rows(self, rows: torch.Tensor) -> None:
        """Continue with these rows, int64 indices on the device. A row may be selected several times."""
        ...


@dataclass(frozen=True)
class DecodingRules:
    """Which tokens may come next. ``impossible`` is bool [vocabulary]: tokens that are neither text nor the end.

    A text ends with the token ``end``, which is impossible before ``min_tokens`` new tokens, or at ``max_tokens``.
    ``repetition_penalty`` divides the positive logits of tokens that the text contains and multiplies the negative
    ones (CTRL, arXiv 1909.05858).
    """

    start: int
    end: int
    impossible: torch.Tensor
    min_tokens: int
    max_tokens: int
    repetition_penalty: float = 1.0

    def apply(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Input and output of ``Decoder.next_logits`` -> float32 [rows, vocabulary], -inf where impossible."""
        new = tokens[:, 1:]
        logits = self._penalize(logits.float(), new) if new.shape[1] else logits.float()
        mask = self.mask()
        if new.shape[1] < self.min_tokens:
            mask[self.end].fill_(-torch.inf)
        return logits + mask  # several times as fast as masked_fill

    def mask(self) -> torch.Tensor:
        """The bias that is added to logits, float32 [vocabulary]."""
        mask = torch.zeros(len(self.impossible), device=self.impossible.device)
        return mask.masked_fill_(self.impossible, -torch.inf)

    def apply_at(
        self, logits: torch.Tensor, new: torch.Tensor, position: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """As ``apply``, with the number of each row's new tokens on the device, ``position`` int64 [rows].

        ``new`` is [rows, any length], padded with the start token, which is impossible; ``mask`` is ``mask()``.
        """
        logits = self._penalize(logits.float(), new) + mask
        logits[:, self.end].masked_fill_(position < self.min_tokens, -torch.inf)
        return logits

    def _penalize(self, logits: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if self.repetition_penalty == 1:
            return logits
        present = logits.gather(1, new)
        present = torch.where(present > 0, present / self.repetition_penalty, present * self.repetition_penalty)
        return logits.scatter(1, new, present)


def compact(active: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Indices of the active rows, in an order that keeps most rows in place: the last ones fill the gaps."""
    order = np.arange(active.sum())
    order[~active[: len(order)]] = len(order) + np.flatnonzero(active[len(order) :])
    return order


Indices = npt.NDArray[np.int64]
#: Images enter when at least 1 / _SHARE of the places are free, since entering is estimated at the time of a step.
_SHARE = 16


def entry_size(places: int) -> int:
    """Images that enter so many places at once, or a multiple, while others hold some of the places."""
    return max(1, places // _SHARE)


@dataclass(frozen=True)
class Entry:
    """Images that enter a decoder.

    Attributes:
        images: indices of the images in the batch, [n].
        places: their places among the images of the decoder, [n].
        rows: the rows of their captions, [n * captions].
        captions: indices of these captions in the batch, [n * captions].
        place_of: the place of each row's image from now on, [rows]; the number of places for a row without a text.
    """

    images: Indices
    places: Indices
    rows: Indices
    captions: Indices
    place_of: Indices


class Schedule:
    """Which images the rows of a decoder hold: rows whose texts have ended are replaced by the next images of a batch.

    It decides by the ends of texts alone, in the order of the images, so that equal batches have equal steps.

    The decoder has so many ``rows`` and ``places`` for images. An image enters with all of its captions, and leaves
    when all of them have ended. Steps may be launched before the ends of texts in an earlier one are known.
    """

    def __init__(self, images: int, captions: int, rows: int, places: int) -> None:
        self.waiting, self.longest = images, 0  # images to come, and the most tokens of a text that may not have ended
        self._images, self._captions, self._places = images, captions, places
        self._place_of = np.full(rows, places)
        self._tokens = np.zeros(rows, np.int64)
        self._first = np.zeros(rows, np.int64)  # the step in which a row's text begins
        self._launched = self._known = 0  # steps, and those whose ends are known

    def launch(self) -> None:
        """Count a step that is launched."""
        self._launched += 1
        self._tokens += 1
        self.longest += 1

    def advance(self, ended: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Take in the ends of the next step: the rows whose texts have ended, bool [rows] -> those of present texts."""
        ended = ended & (self._first[: len(ended)] <= self._known)
        self._known += 1
        if self.waiting:  # else no image enters later, and rows may move
            self._place_of[ended], self._tokens[ended] = self._places, 0
            self.longest = int(self._tokens.max())
        return ended

    def enter(self) -> Entry | None:
        """The images that enter before the next step."""
        if not self.waiting:
            return None
        free = np.flatnonzero(self._place_of == self._places)
        places = np.setdiff1d(np.arange(self._places), self._place_of)
        count, size = min(self.waiting, len(places), len(free) // self._captions), entry_size(self._places)
        if count < self.waiting and len(free) < len(self._place_of):
            count -= count % size
        if not count:
            return None
        images = self._images - self.waiting + np.arange(count)
        places, rows = places[:count], free[: count * self._captions]
        captions = images[:, None] * self._captions + np.arange(self._captions)
        self._place_of[rows], self._tokens[rows] = places.repeat(self._captions), 0
        self._first[rows] = self._launched
        self.waiting -= count
        return Entry(images, places, rows, captions.reshape(-1), self._place_of.copy())


#: Number of most probable tokens that are searched for the nucleus or its edge before the whole vocabulary.
_TOP_TOKENS = 256
#: Block size for summing long distributions.
_BLOCK = 256
#: Rows that are sorted at once, so that their sums in float64 take little memory.
_SORTED_ROWS = 128


@dataclass(frozen=True)
class TokenChooser:
    """Chooses tokens from logits [rows, vocabulary] and float64 numbers [rows] in (0, 1]: rows are independent."""

    spec: CaptionerSpec

    def __call__(self, logits: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """The tokens [rows]; may wait for a device."""
        spec = self.spec
        if spec.strategy == "greedy":
            return logits.argmax(dim=-1)
        if spec.strategy == "top_k":
            return sample_top_k(logits, u, spec.temperature, spec.top_k)
        return sample_nucleus(logits, u, spec.temperature, spec.top_p)

    @property
    def keeps_probabilities(self) -> bool:
        """Whether ``without_waiting`` may leave tokens open."""
        return self.spec.strategy == "nucleus" and self.spec.top_p < 1

    def without_waiting(
        self, logits: torch.Tensor, u: torch.Tensor, probabilities: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tokens [rows], and bool [rows] or None: those that are open, whose nuclei are wide.

        If ``keeps_probabilities``, the probabilities are written to the given tensor, float32 [rows, vocabulary], from
        which ``remaining`` chooses the open tokens.
        """
        if not self.keeps_probabilities:
            return self(logits, u), None
        found = _probabilities(logits, self.spec.temperature)
        probabilities.copy_(found)
        sampled, wide, _ = _sample_narrow_nuclei(found, u, self.spec.top_p)
        return sampled, wide

    def remaining(self, probabilities: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """The tokens [rows] of rows that were left open, without waiting for a device.

        The rows are sorted, which is the fastest way that needs no decision on the host.
        """
        tokens = []
        for rows, numbers in zip(probabilities.split(_SORTED_ROWS), u.split(_SORTED_ROWS), strict=True):
            edge = _nucleus_edge(rows.sort(dim=-1, descending=True).values, self.spec.top_p)
            tokens.append(_invert_cdf(rows.where(rows >= edge, 0), numbers))
        return torch.cat(tokens)


def uniforms(seeds: npt.NDArray[np.uint64], count: int) -> npt.NDArray[np.float64]:
    """Seeds [rows] -> float64 [rows, count] in (0, 1]. Each row is a function of its seed alone."""
    # The raw stream of a bit generator is fixed across numpy versions; the methods of Generator are not.
    raw = [np.random.Philox(key=int(seed)).random_raw(count) for seed in seeds]
    bits = np.array(raw, np.uint64).reshape(len(seeds), count) >> np.uint64(11)
    return (bits.astype(np.float64) + 1) * 2.0**-53


def sample_nucleus(logits: torch.Tensor, u: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Nucleus sampling: logits [rows, vocabulary] and ``u`` float64 [rows] in (0, 1] -> tokens [rows].

    The nucleus is the most probable tokens until their sum reaches ``top_p``, and all tokens as probable as the last.
    Rounded logits often tie, and the order among equals would depend on the sorting algorithm. The token is the
    inverse at ``u`` of the nucleus's cumulative distribution in vocabulary order. Logits of -inf are impossible; a
    row that is not finite gets an arbitrary token.
    """
    probabilities = _probabilities(logits, temperature)
    if top_p >= 1:
        return _invert_cdf(probabilities, u)
    sampled, wide, start = _sample_narrow_nuclei(probabilities, u, top_p)
    if wide.any():
        rows = probabilities[wide]
        edge = _wide_nucleus_edge(rows, start[wide], top_p)
        sampled[wide] = _invert_cdf(rows.where(rows >= edge, 0), u[wide])
    return sampled


def _sample_narrow_nuclei(
    probabilities: torch.Tensor, u: torch.Tensor, top_p: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sample within the top tokens -> tokens [rows], wide nuclei [rows], least probability of the top [rows, 1]."""
    top, tokens = probabilities.topk(min(_TOP_TOKENS, probabilities.shape[-1]), dim=-1)
    edge = _nucleus_edge(top, top_p)
    wide = (top[:, -1:] >= edge).squeeze(-1)  # the nucleus may extend beyond the top tokens
    tokens, order = tokens.sort(dim=-1)  # the distribution is inverted in vocabulary order
    chosen = _invert_cdf(top.where(top >= edge, 0).gather(-1, order), u)
    return tokens.gather(-1, chosen[:, None]).squeeze(-1), wide, top[:, -1:]


def sample_top_k(logits: torch.Tensor, u: torch.Tensor, temperature: float, top_k: int) -> torch.Tensor:
    """As ``sample_nucleus``, from the ``top_k`` most probable tokens and all tokens as probable as the last."""
    probabilities = _probabilities(logits, temperature)
    last = probabilities.topk(min(top_k, probabilities.shape[-1]), dim=-1).values[:, -1:]
    return _invert_cdf(probabilities.where(probabilities >= last, 0), u)


def _probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = logits.float()
    if temperature != 1:  # subtract the maximum, so that a low temperature cannot overflow
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    return torch.softmax(logits, dim=-1)


def _nucleus_edge(descending: torch.Tensor, top_p: float, above: float | torch.Tensor = 0.0) -> torch.Tensor:
    """Smallest probability in the nucleus, [rows, 1], from descending [rows, n] that follow others of sum ``above``."""
    before = _sums(descending) - descending + above
    inside = (before < top_p).sum(-1, keepdim=True)
    return descending.gather(-1, (inside - 1).clamp(min=0))


def _wide_nucleus_edge(probabilities: torch.Tensor, start: torch.Tensor, top_p: float) -> torch.Tensor:
    """Smallest probability in the nucleus, [rows, 1], from unsorted [rows, n], where ``start`` [rows, 1] is in it.

    Uses bisection, which reads each row a dozen times; sorting takes several times as long.
    """
    # Non-negative floats have the order of their bits. Probabilities >= `low` sum to top_p or more, those >= `high`
    # to less.
    low, high = probabilities.amin(-1, keepdim=True).view(torch.int32), start.view(torch.int32) + 1
    few, wide = min(_TOP_TOKENS, probabilities.shape[-1]), widest_float(probabilities.device)
    while True:
        least, most = low.view(torch.float32), high.view(torch.float32)
        between = (probabilities >= least) & (probabilities < most)
        if (((high - low) <= 1) | (between.sum(-1, keepdim=True) <= few)).all():
            above = probabilities.where(probabilities >= most, 0).sum(-1, keepdim=True, dtype=wide)
            return _nucleus_edge(probabilities.where(between, 0).topk(few, dim=-1).values, top_p, above)
        middle = low + (high - low) // 2
        reached = probabilities.where(probabilities >= middle.view(torch.float32), 0)
        enough = reached.sum(-1, keepdim=True, dtype=wide) >= top_p
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)


def _invert_cdf(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Invert the cumulative sum of weights [rows, n] at u [rows] in (0, 1] -> indices [rows] of positive weights."""
    # in float64, so that the order of additions on a device does not change the result
    if weights.shape[-1] <= _BLOCK**2 // 16:
        cumulative = _sums(weights)
        return _first_reaching(cumulative, u[:, None] * cumulative[:, -1:])
    blocks = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    cumulative = _sums(blocks.sum(-1, dtype=widest_float(blocks.device)))
    target = u[:, None] * cumulative[:, -1:]
    block = _first_reaching(cumulative, target)[:, None]
    before = torch.nn.functional.pad(cumulative, (1, 0)).gather(-1, block)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, _BLOCK)).squeeze(1)
    last = (inside > 0).to(torch.int8).flip(-1).argmax(-1)  # its sum may round differently here and in `blocks.sum`
    place = torch.minimum(_first_reaching(_sums(inside) + before, target), _BLOCK - 1 - last)
    return (block.squeeze(-1) * _BLOCK + place).clamp(
        max=weights.shape[-1] - 1
    )  # rows that are not finite may exceed it


def _sums(values: torch.Tensor) -> torch.Tensor:
    """Cumulative sums of values [..., n], in float64, or in float32 on MPS.

    torch has no deterministic cumulative sum of floats on CUDA. There, sums are products with a triangular matrix.
    """
    wide = widest_float(values.device)
    if values.device.type != "cuda":
        return values.cumsum(-1, dtype=wide)
    size = min(values.shape[-1], _BLOCK)
    triangle = torch.ones(size, size, dtype=wide, device=values.device).triu()
    if values.shape[-1] <= _BLOCK:
        return values.double() @ triangle
    blocks = torch.nn.functional.pad(values, (0, -values.shape[-1] % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    inside = blocks.double() @ triangle
    before = torch.nn.functional.pad(_sums(inside[..., -1]), (1, -1))
    return (inside + before[..., None]).flatten(-2)[..., : values.shape[-1]].contiguous()


def _first_reaching(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cumulative sums [rows, n] and ``target`` [rows, 1] -> index [rows] of the first sum that reaches it."""
    return torch.searchsorted(cumulative, target).squeeze(-1).clamp(max=cumulative.shape[-1] - 1)
