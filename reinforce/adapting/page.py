"""The page of an adaptation: metrics before and after, the curve between the weights, and images gained and lost."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reinforce import plots
from reinforce.adapting.choosing import Point, chance, mean
from reinforce.adapting.config import DOMAIN, AdaptConfig
from reinforce.adapting.examples import HeldOut
from reinforce.adapting.interpolate import PICTURE, Sweep
from reinforce.adapting.mixtures import Mixtures
from reinforce.evaluation.config import Evaluation
from reinforce.markup import TEMPLATES, picture_address, render
from reinforce.model_names import short_name
from reinforce.storage import Storage
from teachers.redact import redact_values

PAGE = "index.html"
_EXAMPLES = 12  # of each set, gained and lost
_BY_CHANCE = 0.05  # a gain with a larger probability by chance is not shown by the held-out images


def write_page(config: AdaptConfig, evaluation: Evaluation, sweep: Sweep, mixtures: Mixtures) -> str:
    """Write the page, one file with its pictures in it -> its path."""
    storage, out = Storage(config.output), config.output
    start, last = sweep.points[0], sweep.points[-1]
    names = dict.fromkeys(name for point in sweep.points for name in point.metrics)
    rows = [(name, name in sweep.rule.domain, [point.metrics.get(name) for point in sweep.shown]) for name in names]
    drawn = plots.drawable(f"{out}/{PAGE}: its curve is")
    examples = [*_examples(evaluation, sweep, mixtures)]
    page = render(
        "adapt.html",
        title=short_name(config.released.model),
        source=redact_values(config.source),
        output=shlex.quote(out),
        style=(TEMPLATES / "report" / "report.css").read_text(encoding="utf-8"),
        domain=(mean(start.metrics, sweep.rule.domain), mean(sweep.chosen.metrics, sweep.rule.domain)),
        general=(mean(start.metrics, sweep.rule.general), mean(sweep.chosen.metrics, sweep.rule.general)),
        has_general=bool(sweep.rule.general),
        alpha=sweep.chosen.alpha,
        rule=sweep.rule.describe(),
        rows=rows,
        points=[(point.alpha, _means(point, sweep), point is sweep.chosen) for point in sweep.points],
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


def _means(point: Point, sweep: Sweep) -> tuple[float, float]:
    return mean(point.metrics, sweep.rule.domain), mean(point.metrics, sweep.rule.general)


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
        shown = [("Gained", _cards(gained)), ("Lost", _cards(lost))]
        yield {"kind": kind, "counts": counts, "images": len(before), "shown": shown, "chance": by_chance}


def _cards(examples: Sequence[Any]) -> list[Mapping[str, str]]:
    return [
        {
            "picture": picture_address(example.picture),
            "key": example.before.key,
            "truth": example.before.truth,
            "before": example.before.text,
            "after": example.after.text,
        }
        for example in examples
    ]
