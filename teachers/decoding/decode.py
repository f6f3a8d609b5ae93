"""Beam search and diverse beam search over the rows of many images at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from teachers.decoding.device_sampling import DeviceDecoder, DeviceSampler
from teachers.decoding.sampling import Decoder, DecodingRules, TokenChooser, compact, uniforms
from teachers.runtime.accelerator import Accelerator, upload
from teachers.spec import DIVERSITY, CaptionerSpec

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
    sums = torch.full(shape, -torch.inf, device=device)  # log-probabilities of the open beams
    ended = _EndedTexts(sums.clone(), torch.full((*shape, longest), rules.end, device=device), rules.end)
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
        scores, tokens = (torch.cat(parts) for parts in zip(*((one.scores, one.tokens) for one in of), strict=True))
        best = _EndedTexts(scores, tokens, rules.end).texts(captions)
        for image, texts_of_image in zip(np.concatenate(which).tolist(), best, strict=True):
            texts[image] = texts_of_image
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
        found = []
        for scores, tokens in zip(self.scores.tolist(), self.tokens.tolist(), strict=True):
            ranked = sorted((rank, -score, group) for group, of in enumerate(scores) for rank, score in enumerate(of))
            texts = [tokens[group][rank] for rank, cost, group in ranked if cost < torch.inf]
            distinct = list(dict.fromkeys(tuple(itertools.takewhile(self.end.__ne__, text)) for text in texts))
            found.append([list(distinct[n % len(distinct)]) for n in range(captions)])
        return found


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


#: Logits [rows, vocabulary] and float64 [rows] in (0, 1] -> tokens [rows].
Choose = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
BEAMS = ("beams", "diverse_beams")


def draw(seeds: npt.NDArray[np.uint64], rules: DecodingRules, spec: CaptionerSpec) -> npt.NDArray[Any]:
    """What ``decode`` takes in place of seeds [images, captions]: numbers [images, captions, tokens] if it samples."""
    if spec.strategy in BEAMS:
        return seeds
    if spec.strategy == "greedy":
        return np.ones((*seeds.shape, rules.max_tokens))
    return uniforms(seeds.reshape(-1), rules.max_tokens).reshape(*seeds.shape, rules.max_tokens)


def decode(
    decoder: Decoder | DeviceDecoder,
    rules: DecodingRules,
    spec: CaptionerSpec,
    seeds: npt.NDArray[Any],
    sampler: DeviceSampler | None = None,
) -> list[list[list[int]] | None]:
    """Decode the captions of a batch with one row per image and seeds [images, captions] -> their new tokens.

    ``seeds`` may be the result of ``draw``. With sampling, caption (b, n) is a function of image b and ``seeds[b, n]``,
    otherwise of image b alone, up to the rounding of matrix products. An image whose logits are not finite gives None.
    Raises ValueError if that happens to every image of several, which points to the model.

    ``sampler`` is used in place of ``sample`` and needs a ``DeviceDecoder``. Texts then differ by rounding alone.
    """
    images, captions = seeds.shape[:2]
    if spec.strategy in BEAMS:
        groups, diversity = (spec.groups, DIVERSITY) if spec.strategy == "diverse_beams" else (1, 0.0)
        options = BeamOptions(spec.beams, groups, diversity, spec.length_penalty)
        texts = beam_search(decoder, rules, images, captions, options)
    else:
        drawn = seeds if seeds.ndim > 2 else draw(seeds, rules, spec)
        if sampler is None:
            texts = sample(decoder, rules, TokenChooser(spec), torch.from_numpy(drawn))
        else:
            texts = sampler.sample(decoder, drawn)  # type: ignore[arg-type]
    if images > 1 and not any(texts):
        raise ValueError("next-token logits are not finite: check the weights, or use `precision: bf16` or `fp32`")
    return texts


def sample(decoder: Decoder, rules: DecodingRules, choose: Choose, drawn: torch.Tensor) -> list[list[list[int]] | None]:
    """Decode token by token on a CPU: token i of caption n of image b by ``choose`` with the number ``drawn[b, n, i]``.

    Returns the new tokens of each image's captions, None for an image whose logits are not finite. Rows that have
    ended leave the batch.
    """
    images, captions, _ = drawn.shape
    drawn = drawn.flatten(0, 1)
    tokens = torch.full((len(drawn), 1), rules.start)
    running = np.arange(len(drawn))  # the caption of each row
    texts: list[list[int]] = [[] for _ in running]
    failed = np.zeros(images, bool)
    for step in range(rules.max_tokens):
        rows = tokens if step else tokens[::captions]  # before the first token, the captions of an image share a row
        logits = rules.apply(decoder.next_logits(rows), rows)
        if not step:
            decoder.select_rows(torch.arange(images).repeat_interleave(captions))
            logits = logits.repeat_interleave(captions, dim=0)
        chosen = choose(logits, drawn[:, step])
        broken = ~logits.amax(-1).isfinite()
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        ended, lost = torch.stack([(chosen == rules.end) | broken, broken]).numpy()
        if not ended.any():
            continue
        failed[running[lost] // captions] = True
        for caption, text in zip(running[ended], tokens[torch.from_numpy(ended), 1:-1].tolist(), strict=True):
            texts[caption] = text
        order = compact(~ended)
        running, kept = running[order], torch.from_numpy(order)
        tokens, drawn = tokens[kept], drawn[kept]
        if not len(order):
            break
        decoder.select_rows(kept)
    for caption, text in zip(running, tokens[:, 1:].tolist(), strict=True):
        texts[caption] = text
    return [None if failed[i] else texts[i * captions : (i + 1) * captions] for i in range(images)]


class DecodingCaptioner:
    """A ``Captioner`` of a model with the tokens ``start`` and ``end`` and a mask of ``impossible`` ones, bool
    [vocabulary].

    A derived class decodes the tokens of images in ``_generate``, and makes texts of tokens in ``_text``. Steps with
    ``on_device`` are sampled there.
    """

    def __init__(
        self, spec: CaptionerSpec, accelerator: Accelerator, start: int, end: int, impossible: torch.Tensor,
        on_device: bool,
    ) -> None:  # fmt: skip
        self.captions, self._spec, self._accelerator = spec.captions, spec, accelerator
        self._rules = DecodingRules(
            start=start,
            end=end,
            impossible=impossible.to(accelerator.device),
            min_tokens=spec.min_length,
            max_tokens=spec.max_length - 2,  # start and end count
            repetition_penalty=spec.repetition_penalty,
        )
        samples = on_device and spec.strategy not in BEAMS
        self._sampler = DeviceSampler(self._rules, TokenChooser(spec)) if samples else None

    @torch.inference_mode()
    def caption(self, pixels: torch.Tensor, seeds: npt.NDArray[np.uint64]) -> list[list[str] | None]:
        """Pixels float32 [B, 3, H, W] and seeds [B, captions] -> captions of each image, None if its logits are NaN.

        Caption (b, n) is a function of image b and seeds[b, n], or of image b alone without sampling, up to the
        rounding of matrix products, which may depend on the batch. Raises ValueError if the logits of all of several
        images are NaN.
        """
        return self.to_texts(self.generate(pixels, seeds))

    def draw(self, seeds: npt.NDArray[np.uint64]) -> npt.NDArray[Any]:
        """What ``generate`` takes in place of seeds; needs no accelerator."""
        return draw(seeds, self._rules, self._spec)

    @torch.inference_mode()
    def generate(self, pixels: torch.Tensor, seeds: npt.NDArray[Any]) -> list[list[list[int]] | None]:
        """As ``caption``, but the tokens of each caption between start and end. ``seeds`` may be those of ``draw``."""
        if seeds.shape[:2] != (len(pixels), self.captions):
            raise ValueError(f"expected seeds of shape {(len(pixels), self.captions)}, got {seeds.shape}")
        return self._generate(pixels, seeds)

    def to_texts(self, captions: Sequence[list[list[int]] | None]) -> list[list[str] | None]:
        """Turn the tokens of ``generate`` into texts; needs no accelerator."""
        return [None if tokens is None else [self._text(text) for text in tokens] for tokens in captions]

    def _generate(self, pixels: torch.Tensor, seeds: npt.NDArray[Any]) -> list[list[list[int]] | None]:
        raise NotImplementedError

    def _text(self, tokens: list[int]) -> str:
        raise NotImplementedError
