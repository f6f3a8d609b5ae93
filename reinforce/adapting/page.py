"""The page of an adaptation: metrics before and after, the curve between the weights, and held-out images that one of
both models gets right and the other does not.
"""

from __future__ import annotations

import io
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from reinforce import plots
from reinforce.adapting.choosing import Point, chance, mean
from reinforce.adapting.config import DOMAIN, AdaptConfig
from reinforce.adapting.interpolate import PICTURE, Sweep
from reinforce.adapting.mixtures import Mixtures
from reinforce.evaluation.classes import load_templates
from reinforce.evaluation.config import Evaluation
from reinforce.evaluation.encoding import Models
from reinforce.evaluation.images import ImageBatches
from reinforce.evaluation.kinds.labels import ZeroShotSet
from reinforce.evaluation.reading import LabelledImage
from reinforce.images.policy import decode
from reinforce.markup import TEMPLATES, picture_address, render
from reinforce.model_names import short_name
from reinforce.source.samples import Refusal, T
from reinforce.storage import Storage
from teachers.redact import redact_values

PAGE = "index.html"
_EXAMPLES = 12  # of each set, gained and lost
_BY_CHANCE = 0.05  # a gain with a larger probability by chance is not shown by the held-out images
_SIMILARITIES = 2**24  # computed at once, 8 bytes each
_SIDE = 200  # pixels of the longer side of a picture


def write_page(config: AdaptConfig, evaluation: Evaluation, sweep: Sweep, mixtures: Mixtures) -> str:
    """Write the page, one file with its pictures in it -> its path."""
    storage, out = Storage(config.output), config.output
    start, last, rule = sweep.points[0], sweep.points[-1], sweep.rule
    names = dict.fromkeys(name for point in sweep.points for name in point.metrics)
    rows = [(name, name in rule.domain, [point.metrics.get(name) for point in sweep.shown]) for name in names]
    drawn = plots.drawable(f"{out}/{PAGE}: its curve is")
    examples = [*_examples(evaluation, sweep, mixtures)]
    page = render(
        "adapt.html",
        title=short_name(config.released.model),
        source=redact_values(config.source),
        output=shlex.quote(out),
        style=(TEMPLATES / "report" / "report.css").read_text(encoding="utf-8"),
        domain=tuple(mean(point.metrics, rule.domain) for point in (start, sweep.chosen)),
        general=tuple(mean(point.metrics, rule.general) for point in (start, sweep.chosen)),
        has_general=bool(rule.general),
        alpha=sweep.chosen.alpha,
        rule=rule.describe(),
        rows=rows,
        points=[
            (one.alpha, tuple(mean(one.metrics, of) for of in (rule.domain, rule.general)), one is sweep.chosen)
            for one in sweep.points
        ],
        curve=picture_address(Storage(f"{out}/model").read_bytes(PICTURE, limit=2**24), "png") if drawn else None,
        examples=examples,
        advice=[*advice(sweep, start, last, min((one["chance"] for one in examples), default=1.0))],
    )
    storage.write_bytes(page.encode(), PAGE)
    return f"{out}/{PAGE}"


def advice(sweep: Sweep, start: Point, last: Point, by_chance: float = 0.0) -> Iterator[str]:
    """What to try next, by what the points show, and by the probability of the held-out images' gain by chance."""
    rule, chosen = sweep.rule, sweep.chosen
    gain = mean(chosen.metrics, rule.domain) - mean(start.metrics, rule.domain)
    if not rule.general:
        yield "Name general sets (--zero-shot, --retrieval): without them nothing shows what the model forgets."
    if gain > 0 and by_chance > _BY_CHANCE:
        yield (
            f"The held-out images are too few to tell this gain from chance (p = {by_chance:.2f} by a sign test): add "
            "images, or hold out more of them: --set held_out=0.4."
        )
    if chosen.alpha == 0 or gain <= 0:
        yield (
            "The training did not help on the held-out images. Add images, check their captions by `reinforce inspect`,"
            " or train at a higher rate: --set student.train.optimizer.lr=3e-5."
        )
    elif chosen.alpha == last.alpha and mean(last.metrics, rule.domain) >= max(
        mean(point.metrics, rule.domain) for point in sweep.points
    ):
        yield "The trained weights are the best ones: train for longer, --set student.train.epochs=20."
    if rule.general and mean(last.metrics, rule.general) < mean(start.metrics, rule.general) - rule.allow:
        yield (
            "At alpha 1 more is forgotten than is allowed: raise the weights of the anchors, "
            "--set student.loss.anchor.similarities=3, or lower the rate, student.train.optimizer.lr."
        )
    yield "Another seed shows how much of the difference is chance: --set seed=1, in another folder."


def _examples(evaluation: Evaluation, sweep: Sweep, mixtures: Mixtures) -> Iterator[Mapping[str, Any]]:
    """Images of each held-out set that the chosen weights gain and lose."""
    first, second = sweep.models
    for name, kind in {f"zero_shot/{DOMAIN}": "class", f"retrieval/{DOMAIN}": "caption"}.items():
        if name not in evaluation.own_sets:
            continue
        held_out = HeldOut(evaluation, name)
        before, after = (
            held_out.answers(mixtures.loaded({first: 1 - alpha, second: alpha})) for alpha in (0.0, sweep.chosen.alpha)
        )
        counts = [sum(answer.right for answer in of) for of in (before, after)]
        changes = [new.right - old.right for old, new in zip(before, after, strict=True)]
        by_chance = chance(changes.count(1), changes.count(-1))
        gained, lost = held_out.examples(before, after, _EXAMPLES)
        shown = [("Gained", gained), ("Lost", lost)]
        yield {"kind": kind, "counts": counts, "images": len(before), "shown": shown, "chance": by_chance}


@dataclass(frozen=True)
class Answer:
    """What a model takes an image for: a class or a caption, and whether it is one of the image.

    ``number`` is that of the image in its set, ``truth`` its class or its first caption.
    """

    number: int
    key: str
    truth: str
    text: str
    right: bool


@dataclass(frozen=True)
class Example:
    """An image that one of two models gets right, as both answer; ``picture`` is the address of a small WebP of it."""

    before: Answer
    after: Answer
    picture: str


class HeldOut:
    """A set of an evaluation, by its name in ``own_sets``, whose images keep their numbers."""

    def __init__(self, evaluation: Evaluation, name: str) -> None:
        self._kind, self._config = evaluation.own_sets[name]
        assert self._kind.open_own is not None
        self._set = self._kind.open_own(self._config, name, evaluation.limits, evaluation.images_from or ())
        self._limits, self._name = evaluation.limits, name

    def answers(self, models: Models) -> list[Answer]:
        """What a model takes the images for; ``models`` has one model."""
        vectors, targets = models.encode_all(ImageBatches(self._numbered, self._set.count, self._limits))
        if not targets:
            return []
        [model] = models.encoders
        if isinstance(self._config, ZeroShotSet):
            texts = [*(self._config.classes or ())]
            templates = load_templates(self._config.templates, self._name)
            candidates = models.classifiers(texts, templates)[model].cpu()
            right = [{int(target)} for _, _, target in targets]
        else:
            texts = [*dict.fromkeys(text for _, _, captions in targets for text in captions)]
            place = {text: number for number, text in enumerate(texts)}
            candidates = models.encode_texts(texts)[model]
            right = [{place[text] for text in captions} for _, _, captions in targets]
        found = zip(targets, right, _best(vectors[model], candidates), strict=True)
        return [Answer(n, key, texts[min(own)], texts[one], one in own) for (n, key, _), own, one in found]

    def examples(
        self, before: Sequence[Answer], after: Sequence[Answer], most: int
    ) -> tuple[list[Example], list[Example]]:
        """Up to ``most`` images that are gained, and that are lost, from one model to another, spread over the set."""
        pairs = [*zip(before, after, strict=True)]
        gained = _spread([pair for pair in pairs if pair[1].right and not pair[0].right], most)
        lost = _spread([pair for pair in pairs if pair[0].right and not pair[1].right], most)
        pictures = self._pictures({one.number for one, _ in (*gained, *lost)})
        found = ([Example(*pair, pictures[pair[0].number]) for pair in of] for of in (gained, lost))
        return next(found), next(found)

    def _numbered(self) -> Iterator[LabelledImage | Refusal]:
        for number, item in enumerate(self._set.examples()):
            yield item if isinstance(item, Refusal) else replace(item, target=(number, item.key, item.target))

    def _pictures(self, numbers: Collection[int]) -> dict[int, str]:
        items = (item for item in self._numbered() if isinstance(item, LabelledImage))
        wanted = (item for item in items if item.target[0] in numbers)
        return {item.target[0]: _picture(decode(item.load(), self._limits)) for item in wanted}


def _spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many items, at equal distances."""
    step = max(1.0, len(items) / most)
    return [items[int(number * step)] for number in range(min(most, len(items)))]


def _picture(image: Image.Image) -> str:
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=75)
    return picture_address(buffer.getvalue())


def _best(images: torch.Tensor, candidates: torch.Tensor) -> list[int]:
    """The most similar of the candidates [C, D] for each image [N, D], by blocks of ``_SIMILARITIES``."""
    columns = candidates.double().T
    blocks = images.split(max(1, _SIMILARITIES // len(candidates)))
    return [int(one) for block in blocks for one in (block.double() @ columns).argmax(1)]
