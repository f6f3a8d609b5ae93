"""Sampling whose randomness belongs to the row: no generator, no neighbours, no batch size in it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

#: Tokens among which a nucleus, or its edge, is looked for before the whole vocabulary is.
_LIKELY = 256
#: Weights that are summed first where a distribution is long.
_BLOCK = 256


def uniforms(seeds: npt.NDArray[np.uint64], count: int) -> npt.NDArray[np.float64]:
    """Seeds [rows] -> [rows, count] numbers in (0, 1], each row a function of its seed alone."""
    # The raw stream of a bit generator is fixed across numpy versions; the methods of Generator are not.
    raw = [np.random.Philox(key=int(seed)).random_raw(count) for seed in seeds]
    bits = np.array(raw, np.uint64).reshape(len(seeds), count) >> np.uint64(11)
    return (bits.astype(np.float64) + 1) * 2.0**-53


def sample_nucleus(logits: torch.Tensor, u: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Logits [rows, vocabulary] and ``u`` float64 [rows] in (0, 1] -> tokens [rows].

    The nucleus is the most probable tokens down to the one that brings their sum to ``top_p``, and all that are as
    probable as that one: rounded logits tie often, and an order among equals would be the sorting's own. ``u``
    inverts its distribution function over the tokens in the vocabulary's order. Logits of -inf are impossible; a row
    that is not finite gets any token.
    """
    probabilities = _probabilities(logits, temperature)
    if top_p >= 1:
        return _invert(probabilities, u)
    likely, tokens = probabilities.topk(min(_LIKELY, probabilities.shape[-1]), dim=-1)
    edge = _edge(likely, top_p)
    wide = (likely[:, -1:] >= edge).squeeze(-1)  # the nucleus may go on behind the likely tokens
    sampled = _among(likely.where(likely >= edge, 0), tokens, u)
    if wide.any():
        rows = probabilities[wide]
        edge = _wide_edge(rows, likely[wide, -1:], top_p)
        sampled[wide] = _invert(rows.where(rows >= edge, 0), u[wide])
    return sampled


def sample_top_k(logits: torch.Tensor, u: torch.Tensor, temperature: float, top_k: int) -> torch.Tensor:
    """As ``sample_nucleus``, from the ``top_k`` most probable tokens and all that are as probable as the last."""
    probabilities = _probabilities(logits, temperature)
    last = probabilities.topk(min(top_k, probabilities.shape[-1]), dim=-1).values[:, -1:]
    return _invert(probabilities.where(probabilities >= last, 0), u)


def _probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = logits.float()
    if temperature != 1:  # from 0 downwards, so that a low temperature cannot overflow
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    return torch.softmax(logits, dim=-1)


def _edge(descending: torch.Tensor, top_p: float, above: float | torch.Tensor = 0.0) -> torch.Tensor:
    """Sorted probabilities [rows, n], with a sum of ``above`` before them -> [rows, 1], the smallest in the nucleus."""
    before = descending.cumsum(-1, dtype=torch.float64) - descending + above
    inside = (before < top_p).sum(-1, keepdim=True)
    return descending.gather(-1, (inside - 1).clamp(min=0))


def _wide_edge(probabilities: torch.Tensor, start: torch.Tensor, top_p: float) -> torch.Tensor:
    """Probabilities [rows, n], whose nuclei reach down to ``start`` [rows, 1] at least -> their smallest, [rows, 1].

    By bisection, which reads the row a dozen times: sorting it takes several times as long.
    """
    # The bits of floats that are not negative are ordered as the floats are. The sum from `low` on reaches top_p,
    # that from `high` on does not.
    low, high = probabilities.amin(-1, keepdim=True).view(torch.int32), start.view(torch.int32) + 1
    few = min(_LIKELY, probabilities.shape[-1])
    while True:
        least, most = low.view(torch.float32), high.view(torch.float32)
        between = (probabilities >= least) & (probabilities < most)
        if (((high - low) <= 1) | (between.sum(-1, keepdim=True) <= few)).all():
            above = probabilities.where(probabilities >= most, 0).sum(-1, keepdim=True, dtype=torch.float64)
            return _edge(probabilities.where(between, 0).topk(few, dim=-1).values, top_p, above)
        middle = low + (high - low) // 2
        reached = probabilities.where(probabilities >= middle.view(torch.float32), 0)
        enough = reached.sum(-1, keepdim=True, dtype=torch.float64) >= top_p
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)


def _among(weights: torch.Tensor, tokens: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Weights [rows, n] of ``tokens`` [rows, n] in any order, and u [rows] -> tokens [rows]."""
    tokens, order = tokens.sort(dim=-1)
    return tokens.gather(-1, _invert(weights.gather(-1, order), u)[:, None]).squeeze(-1)


def _invert(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Weights [rows, n] and u [rows] in (0, 1] -> indices [rows] of weights above 0."""
    # In float64, so that the order in which a device adds does not show.
    if weights.shape[-1] <= _BLOCK**2 // 16:
        cumulative = weights.cumsum(-1, dtype=torch.float64)
        return _first(cumulative, u[:, None] * cumulative[:, -1:])
    blocks = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    cumulative = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = u[:, None] * cumulative[:, -1:]
    block = _first(cumulative, target)[:, None]
    before = torch.nn.functional.pad(cumulative, (1, 0)).gather(-1, block)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, _BLOCK)).squeeze(1)
    last = (inside > 0).to(torch.int8).flip(-1).argmax(-1)  # the sum of a block may be rounded another way
    place = torch.minimum(_first(inside.cumsum(-1, dtype=torch.float64) + before, target), _BLOCK - 1 - last)
    return (block.squeeze(-1) * _BLOCK + place).clamp(max=weights.shape[-1] - 1)  # for rows that are not finite


def _first(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Sums [rows, n] and ``target`` [rows, 1] -> index [rows] of the first that reaches it."""
    return torch.searchsorted(cumulative, target).squeeze(-1).clamp(max=cumulative.shape[-1] - 1)
