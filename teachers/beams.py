"""Beam search, plain and diverse, over the rows of many images at once."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from teachers.rules import Decoder, DecodingRules

Tensor = torch.Tensor


@dataclass(frozen=True)
class Beams:
    """``beams`` texts of an image grow side by side, in ``groups`` of equal size that search for themselves.

    A text's score is the sum of the log-probabilities of its words and of its end, over (words + 1) **
    ``length_penalty``; the end of one that is cut at ``max_tokens`` costs nothing. Probabilities are those after the
    rules, among what is possible.

    Diverse beam search (arXiv 1610.02424): to a group, a word is worth ``diversity`` less for each text of the groups
    before it that took that word in the same step. Scores do not contain this.
    """

    beams: int
    groups: int = 1
    diversity: float = 0.0
    length_penalty: float = 1.0


def search(
    forward: Decoder, rules: DecodingRules, images: int, captions: int, beams: Beams
) -> list[list[list[int]] | None]:
    """-> the words of each image's ``captions`` best texts; None for an image whose logits were not finite.

    Best are the best texts of every group, then their second bests, and so on, each by falling score. A text that
    groups share counts once, and where there are too few they repeat. An image leaves the batch when none of its
    texts that still grow can come before those that have ended.
    """
    shape = (images, beams.groups, beams.beams // beams.groups)
    longest, device = rules.max_tokens, rules.impossible.device
    pool = _Pool.empty(shape, longest, rules.end, device)
    sums = torch.full(shape, -torch.inf, device=device)  # log-probabilities of the texts that grow
    sums[..., 0] = 0  # they are all the same at first: one in each group stands for them
    tokens = torch.full((images * beams.beams, 1), rules.start, device=device)
    running = torch.arange(images)
    texts: list[list[list[int]] | None] = [None] * images
    for words in range(longest):
        rows = tokens if words else tokens[:: beams.beams]
        logits = rules.apply(forward.next_logits(rows), rows)
        if not words:
            forward.select_rows(torch.arange(images).repeat_interleave(beams.beams))
            logits = logits.repeat_interleave(beams.beams, dim=0)
        finite = logits.amax(-1).isfinite().view(len(running), -1).all(-1)
        following = logits.log_softmax(-1).unflatten(0, sums.shape)
        pool = pool.add((sums + following[..., rules.end]) / (words + 1) ** beams.length_penalty, tokens[:, 1:])
        following[..., rules.end] = -torch.inf
        sums, parents, chosen = _grow(sums, following, beams.diversity)

        # A sum can only fall. It weighs least over as many words as can be, or as few if short texts are favoured.
        ends_at = longest + 1 if beams.length_penalty > 0 else words + 2
        hope = sums.amax(-1) / ends_at**beams.length_penalty
        going = ((hope > pool.scores[..., -1]).any(-1) & finite).cpu()
        for i in (~going & finite.cpu()).nonzero().squeeze(1).tolist():
            texts[running[i]] = pool.best(i, captions)
        if not going.any():
            return texts
        kept = going.nonzero().squeeze(1)
        running, kept = running[kept], kept.to(device)
        pool, sums = pool.of(kept), sums[kept]
        firsts = torch.arange(len(tokens), device=device).view(-1, *shape[1:])[kept, :, :1]
        rows = (firsts + parents[kept]).flatten()
        forward.select_rows(rows.cpu())
        tokens = torch.cat([tokens[rows], chosen[kept].view(-1, 1)], dim=1)
    pool = pool.add(sums / (longest + 1) ** beams.length_penalty, tokens[:, 1:])
    for i, image in enumerate(running.tolist()):
        texts[image] = pool.best(i, captions)
    return texts


@dataclass(frozen=True)
class _Pool:
    """The best texts that have ended: ``scores`` [images, groups, n] in falling order, -inf where there is none, and
    ``words`` [images, groups, n, max_tokens], filled up with the end token."""

    scores: Tensor
    words: Tensor
    end: int

    @classmethod
    def empty(cls, shape: tuple[int, int, int], max_tokens: int, end: int, device: torch.device) -> _Pool:
        scores = torch.full(shape, -torch.inf, device=device)
        return cls(scores, torch.full((*shape, max_tokens), end, device=device), end)

    def add(self, scores: Tensor, words: Tensor) -> _Pool:
        """With texts of scores [images, groups, n] and words [images * groups * n, at most max_tokens] among them."""
        padded = torch.nn.functional.pad(words, (0, self.words.shape[-1] - words.shape[-1]), value=self.end)
        of_all = torch.cat([self.words, padded.view(self.words.shape)], dim=2)
        best = torch.cat([self.scores, scores], dim=2).topk(scores.shape[-1], dim=2)
        places = best.indices[..., None].expand_as(self.words)
        return _Pool(best.values, of_all.gather(2, places), self.end)

    def of(self, images: Tensor) -> _Pool:
        return _Pool(self.scores[images], self.words[images], self.end)

    def best(self, image: int, captions: int) -> list[list[int]]:
        """Best first: each group's best, then each group's second best, and so on."""
        scores, words = self.scores[image].tolist(), self.words[image].tolist()
        ranked = sorted((rank, -score, group) for group, of in enumerate(scores) for rank, score in enumerate(of))
        texts = [words[group][rank] for rank, cost, group in ranked if cost < torch.inf]
        distinct = list(dict.fromkeys(tuple(itertools.takewhile(self.end.__ne__, text)) for text in texts))
        return [list(distinct[n % len(distinct)]) for n in range(captions)]


def _grow(sums: Tensor, following: Tensor, diversity: float) -> tuple[Tensor, Tensor, Tensor]:
    """The best continuations of the texts of each group.

    Sums [images, groups, n] and log-probabilities of words [images, groups, n, vocabulary] -> the new sums, the text
    that each goes on from (its number in the group), and the word it adds, all [images, groups, n].
    """
    images, groups, size, vocabulary = following.shape
    taken = sums.new_zeros(images, vocabulary)
    grown = []
    for group in range(groups):
        candidates = sums[:, group, :, None] + following[:, group]
        wanted = candidates - diversity * taken[:, None] if diversity and group else candidates
        best = wanted.flatten(1).topk(size, dim=-1).indices
        parents, words = best // vocabulary, best % vocabulary
        taken.scatter_add_(1, words, torch.ones_like(words, dtype=taken.dtype))
        grown.append((candidates.flatten(1).gather(1, best), parents, words))
    new, parents, words = (torch.stack(parts, dim=1) for parts in zip(*grown, strict=True))
    return new, parents, words
