"""Nucleus sampling whose randomness belongs to the row: no generator, no neighbours, no batch size in it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

#: Tokens among which a nucleus is looked for before the whole vocabulary is sorted.
_LIKELY = 256


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
    inverts its distribution function over the tokens in the vocabulary's order. Logits of -inf are impossible.
    Raises ValueError where a row has no distribution (NaN).
    """
    logits = logits.float()
    probabilities = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, dim=-1)
    if torch.isnan(probabilities[:, 0]).any():
        raise ValueError("next-token logits are not finite: check the weights, or use `precision: bf16` or `fp32`")
    if top_p >= 1:
        return _invert(probabilities, u)
    likely, tokens = probabilities.topk(min(_LIKELY, probabilities.shape[-1]), dim=-1)
    edge = _edge(likely, top_p)
    wide = (likely[:, -1:] >= edge).squeeze(-1)  # the nucleus may go on behind the likely tokens
    tokens, order = tokens.sort(dim=-1)
    likely = likely.gather(-1, order)
    sampled = tokens.gather(-1, _invert(likely.where(likely >= edge, 0), u)[:, None]).squeeze(-1)
    if wide.any():
        rows = probabilities[wide]
        edge = _edge(rows.sort(dim=-1, descending=True).values, top_p)
        sampled[wide] = _invert(rows.where(rows >= edge, 0), u[wide])
    return sampled


def _edge(descending: torch.Tensor, top_p: float) -> torch.Tensor:
    """Sorted probabilities [rows, n] -> [rows, 1], the smallest inside the nucleus."""
    before = descending.cumsum(-1, dtype=torch.float64) - descending
    inside = (before < top_p).sum(-1, keepdim=True)
    return descending.gather(-1, inside - 1)


def _invert(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Weights [rows, n] and u [rows] in (0, 1] -> indices [rows] of weights above 0."""
    # In float64, so that the order in which a device adds does not show.
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:]).squeeze(-1)
