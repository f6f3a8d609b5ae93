"""Beam search and diverse beam search over the rows of many images at once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from teachers.decoding.rules import Decoder, DecodingRules
from teachers.runtime.accelerator import upload

Tensor = torch.Tensor


@dataclass(frozen=True)
class BeamOptions:
    """Options of a beam search with ``beams`` beams per image, in ``groups`` of equal size that search separately.

    The score of a text is the sum of the log-probabilities of its tokens and of its end, divided by
    (tokens + 1) ** ``length_penalty``. A text that is cut at ``max_tokens`` has no end to count. Probabilities are
    those after the decoding rules.

    Diverse beam search (arXiv 1610.02424): in each step, a token costs a group ``diversity`` for every beam of the
    earlier groups that chose it in that step. Scores do not include this cost.
    """

    beams: int
    groups: int = 1
    diversity: float = 0.0
    length_penalty: float = 1.0


def beam_search(
    decoder: Decoder, rules: DecodingRules, images: int, captions: int, options: BeamOptions
) -> list[list[list[int]] | None]:
    """Return the new tokens of the ``captions`` best texts of each image, None for images with non-finite logits.

    The order is the best text of every group, then their second best, and so on, each sorted by falling score. A text
    found by several groups counts once, and texts repeat where there are too few. An image leaves the batch when none
    of its open beams can beat the texts that have ended.
    """
    shape = (images, options.groups, options.beams // options.groups)
    longest, device = rules.max_tokens, rules.impossible.device
    ended = _EndedTexts.empty(shape, longest, rules.end, device)
    sums = torch.full(shape, -torch.inf, device=device)  # log-probabilities of the open beams
    sums[..., 0] = 0  # beams are identical at first, so only one in each group competes
    tokens = torch.full((images * options.beams, 1), rules.start, device=device)
    running = np.arange(images)
    found: list[tuple[npt.NDArray[np.int64], _EndedTexts]] = []
    for step in range(longest):
        rows = tokens if step else tokens[:: options.beams]
        logits = rules.apply(decoder.next_logits(rows), rows)
        if not step:
            decoder.select_rows(torch.arange(images, device=device).repeat_interleave(options.beams))
            logits = logits.repeat_interleave(options.beams, dim=0)
        finite = logits.amax(-1).isfinite().view(len(running), -1).all(-1)
        following = logits.log_softmax(-1).unflatten(0, sums.shape)
        ended = ended.add((sums + following[..., rules.end]) / (step + 1) ** options.length_penalty, tokens[:, 1:])
        following[..., rules.end] = -torch.inf
        sums, parents, chosen = _extend(sums, following, options.diversity)

        # A sum can only fall, so this is an upper bound of the final score: the sum over the greatest length, or over
        # the smallest if the length penalty favors short texts.
        ends_at = longest + 1 if options.length_penalty > 0 else step + 2
        bound = sums.amax(-1) / ends_at**options.length_penalty
        # the one wait for the device in a step
        active, usable = torch.stack([(bound > ended.scores[..., -1]).any(-1) & finite, finite]).cpu().numpy()
        if (done := usable & ~active).any():
            found.append((running[done], ended.of(upload(np.flatnonzero(done), device))))
        running = running[active]
        if not len(running):
            break
        firsts = torch.arange(len(tokens), device=device).view(-1, *shape[1:])[..., :1]
        rows = firsts + parents
        if not active.all():
            kept = upload(np.flatnonzero(active), device)
            ended, sums, rows, chosen = ended.of(kept), sums[kept], rows[kept], chosen[kept]
        decoder.select_rows(rows.flatten())
        tokens = torch.cat([tokens[rows.flatten()], chosen.view(-1, 1)], dim=1)
    else:
        found.append((running, ended.add(sums / (longest + 1) ** options.length_penalty, tokens[:, 1:])))
    texts: list[list[list[int]] | None] = [None] * images
    if found:
        which, of = zip(*found, strict=True)
        for image, best in zip(np.concatenate(which).tolist(), _EndedTexts.joined(of).texts(captions), strict=True):
            texts[image] = best
    return texts


@dataclass(frozen=True)
class _EndedTexts:
    """The n best ended texts of each group.

    ``scores`` is [images, groups, n] in falling order, -inf where there is none. ``tokens`` is
    [images, groups, n, max_tokens], padded with the end token.
    """

    scores: Tensor
    tokens: Tensor
    end: int

    @classmethod
    def empty(cls, shape: tuple[int, int, int], max_tokens: int, end: int, device: torch.device) -> _EndedTexts:
        scores = torch.full(shape, -torch.inf, device=device)
        return cls(scores, torch.full((*shape, max_tokens), end, device=device), end)

    @classmethod
    def joined(cls, parts: Sequence[_EndedTexts]) -> _EndedTexts:
        return cls(torch.cat([part.scores for part in parts]), torch.cat([part.tokens for part in parts]), parts[0].end)

    def add(self, scores: Tensor, tokens: Tensor) -> _EndedTexts:
        """Merge texts with scores [images, groups, n] and tokens [images * groups * n, at most max_tokens]."""
        padded = torch.nn.functional.pad(tokens, (0, self.tokens.shape[-1] - tokens.shape[-1]), value=self.end)
        candidates = torch.cat([self.tokens, padded.view(self.tokens.shape)], dim=2)
        best = torch.cat([self.scores, scores], dim=2).topk(scores.shape[-1], dim=2)
        places = best.indices[..., None].expand_as(self.tokens)
        return _EndedTexts(best.values, candidates.gather(2, places), self.end)

    def of(self, images: Tensor) -> _EndedTexts:
        return _EndedTexts(self.scores[images], self.tokens[images], self.end)

    def texts(self, captions: int) -> list[list[list[int]]]:
        """The texts of each image: the best of each group by falling score, each group's second best, and so on."""
        return [self._best(*image, captions) for image in zip(self.scores.tolist(), self.tokens.tolist(), strict=True)]

    def _best(self, scores: list[list[float]], tokens: list[list[list[int]]], captions: int) -> list[list[int]]:
        ranked = sorted((rank, -score, group) for group, of in enumerate(scores) for rank, score in enumerate(of))
        texts = [tokens[group][rank] for rank, cost, group in ranked if cost < torch.inf]
        distinct = list(dict.fromkeys(tuple(itertools.takewhile(self.end.__ne__, text)) for text in texts))
        return [list(distinct[n % len(distinct)]) for n in range(captions)]


def _extend(sums: Tensor, following: Tensor, diversity: float) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the best continuations of the beams of each group.

    Sums [images, groups, n] and log-probabilities of the next token [images, groups, n, vocabulary] -> the new sums,
    the beam of the group that each extends, and the token it adds, all [images, groups, n].
    """
    images, groups, size, vocabulary = following.shape
    taken = sums.new_zeros(images, vocabulary)
    extended = []
    for group in range(groups):
        candidates = sums[:, group, :, None] + following[:, group]
        penalized = candidates - diversity * taken[:, None] if diversity and group else candidates
        best = penalized.flatten(1).topk(size, dim=-1).indices
        parents, chosen = best // vocabulary, best % vocabulary
        taken.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=taken.dtype))
        extended.append((candidates.flatten(1).gather(1, best), parents, chosen))
    new, parents, chosen = (torch.stack(parts, dim=1) for parts in zip(*extended, strict=True))
    return new, parents, chosen
