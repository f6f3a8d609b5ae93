"""Choice of the next token: nucleus and top-k sampling by a number per row, so that rows are independent, or greedy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from teachers.runtime.accelerator import widest_float
from teachers.spec import CaptionerSpec

#: Number of most probable tokens that are searched for the nucleus or its edge before the whole vocabulary.
_TOP_TOKENS = 256
#: Block size for summing long distributions.
_BLOCK = 256
#: Rows that are sorted at once, so that their sums in float64 take little memory.
_SORTED_ROWS = 128


@dataclass(frozen=True)
class TokenChooser:
    """Chooses tokens from logits [rows, vocabulary] and float64 numbers [rows] in (0, 1]."""

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
    return _sample_tokens(top.where(top >= edge, 0), tokens, u), wide, top[:, -1:]


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


def _sample_tokens(weights: torch.Tensor, tokens: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Weights [rows, n] of ``tokens`` [rows, n] in any order and u [rows] -> tokens [rows]."""
    tokens, order = tokens.sort(dim=-1)
    return tokens.gather(-1, _invert_cdf(weights.gather(-1, order), u)[:, None]).squeeze(-1)


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
