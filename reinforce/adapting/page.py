"""The page of an adaptation: metrics before and after, the curve between the weights, and held-out images that one of
both models gets right and the other does not.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reinforce import plots
from reinforce.adapting.choosing import Point, mean
from reinforce.adapting.config import AdaptConfig
from reinforce.adapting.gain import Gain
from reinforce.adapting.held_out import CAPTIONS, CLASSES, HeldOut
from reinforce.adapting.interpolate import PICTURE, Sweep
from reinforce.adapting.mixtures import Mixtures
from reinforce.markup import TEMPLATES, picture_address, render
from reinforce.model_names import short_name
from reinforce.storage import Storage
from teachers.redact import redact_values

PAGE = "index.html"
_KINDS = {CLASSES: "class", CAPTIONS: "caption"}
_EXAMPLES = 12  # of each set, gained and lost
_BY_CHANCE = 0.05  # a gain with a larger probability by chance is not shown by the held-out images


def write_page(
    config: AdaptConfig,
    sweep: Sweep,
    gain: Gain | None,
    notes: Sequence[str],
    held_out: Mapping[str, HeldOut],
    mixtures: Mixtures,
) -> str:
    """Write the page, one file with its pictures in it -> its path; ``notes`` are lines beside the metrics."""
    storage, out = Storage(config.output), config.output
    start, last, rule = sweep.points[0], sweep.points[-1], sweep.rule
    names = dict.fromkeys(name for point in sweep.points for name in point.metrics)
    rows = [(name, name in rule.domain, [point.metrics.get(name) for point in sweep.shown]) for name in names]
    drawn = plots.drawable(f"{out}/{PAGE}: its curve is")
    examples = [*_examples(held_out, sweep, mixtures)]
    page = render(
        "adapt.html",
        title=short_name(config.released.model),
        source=redact_values(config.source),
        output=shlex.quote(out),
        style=(TEMPLATES / "report" / "report.css").read_text(encoding="utf-8"),
        gain=gain,
        notes=notes,
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
        advice=[*advice(sweep, gain, start, last)],
    )
    storage.write_bytes(page.encode(), PAGE)
    return f"{out}/{PAGE}"


def advice(sweep: Sweep, gain: Gain | None, start: Point, last: Point) -> Iterator[str]:
    """What to try next, by what the points and the gain on the held-out images show."""
    rule, chosen = sweep.rule, sweep.chosen
    if not rule.general:
        yield "Name general sets (--zero-shot, --retrieval): without them nothing shows what the model forgets."
    if gain is None or (gain.gain > 0 and gain.p > _BY_CHANCE):
        yield (
            "The held-out images are too few to tell a gain from chance: add images, or hold out more of them: "
            "--set held_out=0.4."
        )
    if chosen.alpha == 0 or (gain is not None and gain.gain <= 0):
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


def _examples(sets: Mapping[str, HeldOut], sweep: Sweep, mixtures: Mixtures) -> Iterator[Mapping[str, Any]]:
    """Images of each held-out set that the chosen weights gain and lose."""
    for name, held_out in sets.items():
        before, after = (held_out.answers(mixtures.loaded(sweep.shares(alpha))) for alpha in (0.0, sweep.chosen.alpha))
        counts = [sum(answer.right for answer in of) for of in (before, after)]
        gained, lost = held_out.examples(before, after, _EXAMPLES)
        shown = [("Gained", gained), ("Lost", lost)]
        yield {"kind": _KINDS[name], "counts": counts, "images": len(before), "shown": shown}
