"""The charts of a report, from the rows that were looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from reinforce.dataset.augment.records import OPS
from reinforce.dataset.layers import TRUE_CAPTION
from reinforce.inspection.charts import Chart, Dot, DotChart, Mark, Series
from reinforce.inspection.rows import Rows
from reinforce.inspection.targets import BATCH, SCALES
from reinforce.inspection.texts import TextFigures

_BINS = 40
_AREA_BINS = 8
_LONGEST = 0.995  # of the captions are in the chart of lengths; the rest would stretch it
_QUANTILES = (0.05, 0.95, 0.25, 0.75, 0.5, 0.0, 1.0)  # at which samples are shown, the most important last
_FEW = 30  # an operation with fewer crops is not shown
TRUE_LABEL = "true captions"


def similarity_charts(rows: Rows) -> Iterator[Chart]:
    """For each teacher, the similarities of true and of synthetic captions to their images."""
    for teacher in rows.teachers:
        values = {TRUE_LABEL: rows.true_similarity(teacher)}
        values |= {name: rows.similarities(teacher, name) for name in rows.captioners}
        finite = {name: found[np.isfinite(found)] for name, found in values.items()}
        finite = {name: found for name, found in finite.items() if len(found)}
        if not finite:
            continue
        every = np.concatenate([*finite.values()])
        edges = np.linspace(every.min(), max(every.max(), every.min() + 1e-3), _BINS + 1)
        yield Chart(
            teacher,
            "Cosine of each caption's vector with those of its image, mean over the augmentations.",
            "similarity to the image",
            "share of captions",
            [_histogram(name, found, edges, colour) for (name, found), colour in zip_colours(finite)],
            ["captions", "number", "mean", "5 %", "median", "95 %"],
            [[name, f"{len(found):,}", f"{found.mean():.3f}", *_quantiles(found)] for name, found in finite.items()],
            y_share=True,
        )


def quantile_rows(values: np.ndarray) -> list[tuple[str, int]]:
    """The rows at some quantiles of their finite values, each with the quantile as text; none twice."""
    finite = np.flatnonzero(np.isfinite(values))
    ordered = finite[np.argsort(values[finite], kind="stable")]
    places = {round(share * (len(ordered) - 1)): share for share in _QUANTILES} if len(ordered) else {}
    return [(f"{places[place]:.0%}".replace("%", " %"), int(ordered[place])) for place in sorted(places)]


def number_charts(rows: Rows) -> Iterator[tuple[Chart, list[tuple[str, int]]]]:
    """The distribution of each score, and the rows at its quantiles."""
    for (layer, name), every in rows.scores().items():
        found = every[np.isfinite(every)]
        if not len(found):
            continue
        at = quantile_rows(every)
        edges = np.linspace(found.min(), max(found.max(), found.min() + 1e-3), _BINS + 1)
        yield (
            Chart(
                f"{layer}: {name}",
                f"Of {len(found):,} samples; {len(every) - len(found):,} have none.",
                name,
                "share of samples",
                [_histogram(name, found, edges, 0)],
                ["score", "number", "mean", "5 %", "median", "95 %"],
                [[name, f"{len(found):,}", f"{found.mean():.3f}", *_quantiles(found)]],
                y_share=True,
            ),
            [(f"{share}: {every[row]:.4g}", row) for share, row in at],
        )


def zip_colours(named: Mapping[str, np.ndarray]) -> Iterator[tuple[tuple[str, np.ndarray], int | None]]:
    """Items with their colours: grey for true captions, the palette for captioners."""
    colour = 0
    for name, values in named.items():
        if name == TRUE_LABEL:
            yield (name, values), None
        else:
            yield (name, values), colour
            colour += 1


def _quantiles(values: np.ndarray) -> list[str]:
    return [f"{quantile:.3f}" for quantile in np.quantile(values, (0.05, 0.5, 0.95))]


def _histogram(label: str, values: np.ndarray, edges: np.ndarray, colour: int | None, filled: bool = False) -> Series:
    shares = np.histogram(values, edges)[0] / len(values)
    points = [*zip(edges[:-1].tolist(), shares.tolist(), strict=True), (float(edges[-1]), 0.0)]
    return Series(label, points, colour, filled=filled or colour is None, steps=True)


def area_chart(rows: Rows) -> Chart | None:
    """The similarity of the true caption to a crop, by the crop's share of the image."""
    areas = _joined(rows.areas)
    series, table = [], []
    for number, teacher in enumerate(rows.teachers):
        values = rows.similarities(teacher, TRUE_CAPTION)
        if values.shape != areas.shape or not np.isfinite(values).any():
            continue
        finite = np.isfinite(values)
        x, y = areas[finite], values[finite]
        edges = np.unique(np.quantile(x, np.linspace(0, 1, _AREA_BINS + 1)))
        places = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, max(0, len(edges) - 2))
        found = [(x[places == n], y[places == n]) for n in range(max(1, len(edges) - 1))]
        found = [(one, other) for one, other in found if len(one)]
        points = [(float(one.mean()), float(other.mean())) for one, other in found]
        band = [(float(one.mean()), *map(float, np.quantile(other, (0.25, 0.75)))) for one, other in found]
        series.append(Series(teacher, points, number, band=[(a, b, c) for a, b, c in band], dots=True))
        table += [
            [teacher, f"{a:.0%}", f"{b:.3f}", f"{low:.3f} to {high:.3f}"]
            for (a, b), (_, low, high) in zip(points, band, strict=True)
        ]
    if not series:
        return None
    return Chart(
        "Crop size",
        "Mean over crops of similar size; the band holds the middle half of them.",
        "crop, share of the image's area",
        "similarity to the true caption",
        series,
        ["teacher", "crop size", "mean", "middle half"],
        table,
        x_share=True,
    )


def operation_chart(rows: Rows) -> DotChart | None:
    """How each operation changes the similarity of a crop to the true caption."""
    bits = _joined(rows.operations)
    used = [(name, (bits & (1 << n)) > 0) for n, name in enumerate(OPS)]
    used = [(name, has) for name, has in used if has.sum() >= _FEW]
    teachers = [
        (number, teacher, rows.similarities(teacher, TRUE_CAPTION))
        for number, teacher in enumerate(rows.teachers)
        if rows.similarities(teacher, TRUE_CAPTION).shape == bits.shape and bits.shape[1] > 1
    ]
    if not used or not teachers:
        return None
    effects = []
    for name, has in used:
        dots = []
        for number, _, values in teachers:
            change = (values - values.mean(axis=1, keepdims=True))[has]
            change = change[np.isfinite(change)]
            if len(change) >= _FEW:
                error = 1.96 * float(change.std()) / len(change) ** 0.5
                mean = float(change.mean())
                dots.append(Dot(mean, mean - error, mean + error, number))
        effects.append((name, dots))
    effects = sorted(((n, dots) for n, dots in effects if dots), key=lambda one: np.mean([d.value for d in one[1]]))
    if not effects:
        return None
    return DotChart(
        "Operations",
        "Change against the mean over the sample's augmentations, with 95 % intervals: what costs similarity is left.",
        "change of the similarity to the true caption",
        [name for name, _ in effects],
        [dots for _, dots in effects],
        [(teacher, number) for number, teacher, _ in teachers],
        ["operation", *(teacher for _, teacher, _ in teachers)],
        [[name, *(f"{dot.value:+.4f} \u00b1 {dot.high - dot.value:.4f}" for dot in dots)] for name, dots in effects],
    )


def agreement_chart(rows: Rows) -> Chart | None:
    """How far the teachers' targets agree, over samples."""
    values = rows.targets.agreements()
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return None
    edges = np.linspace(float(values.min()), max(1.0, float(values.max())), _BINS + 1)
    return Chart(
        "Agreement of the teachers",
        "1 \u2212 the Jensen-Shannon divergence of their targets / log T at the logit scales in force; 1 is full "
        f"agreement. Targets are of batches of at least {BATCH} pairs, or all there are.",
        "agreement",
        "share of samples",
        [_histogram("samples", values, edges, 0, filled=True)],
        ["samples", "mean", "5 %", "median", "95 %"],
        [[f"{len(values):,}", f"{values.mean():.3f}", *_quantiles(values)]],
        y_share=True,
    )


def correlations(rows: Rows) -> tuple[list[str], list[list[float | None]]]:
    """The teachers, and the rank correlations of their similarities of true captions."""
    ranked: dict[str, np.ndarray] = {}
    values = {teacher: rows.true_similarity(teacher) for teacher in rows.targets.scales}
    valid = np.logical_and.reduce([np.isfinite(v) for v in values.values()]) if values else np.zeros(0, bool)
    if valid.sum() < 3:
        return [], []
    for teacher, found in values.items():
        ranked[teacher] = np.argsort(np.argsort(found[valid], kind="stable"), kind="stable").astype(float)
    names = [*ranked]
    return names, [[_correlation(ranked[a], ranked[b]) for b in names] for a in names]


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def entropy_chart(rows: Rows) -> Chart | None:
    """The entropy of each teacher's targets by logit scale, with the scale in force."""
    series, marks, table = [], [], []
    for number, teacher in enumerate(rows.teachers):
        values = rows.targets.entropy(teacher) if teacher in rows.targets.scales else []
        if not values:
            continue
        series.append(Series(teacher, [*zip(map(float, SCALES), values, strict=True)], number))
        scale = rows.targets.scales[teacher]
        at = "-"
        if scale is not None:
            marks.append(Mark(min(max(scale, SCALES[0]), SCALES[-1]), f"{scale:g}", number))
            at = f"{np.interp(scale, SCALES, values):.3f}"
        table.append([teacher, "-" if scale is None else f"{scale:g}", at, f"{values[0]:.3f}", f"{values[-1]:.3f}"])
    if not series:
        return None
    return Chart(
        "Entropy of the targets",
        "Mean entropy of the softmax over a batch, in both directions, / log of the batch: 0 is one-hot, 1 uniform. "
        "Dashed lines are the logit scales in force.",
        "logit scale",
        "entropy / log B",
        series,
        ["teacher", "scale in force", "entropy there", f"at {SCALES[0]}", f"at {SCALES[-1]}"],
        table,
        marks,
        x_log=True,
        y_zero=True,
    )


def length_chart(texts: Mapping[str, TextFigures]) -> Chart | None:
    """The lengths of captions in words."""
    found = {
        TRUE_LABEL if name == TRUE_CAPTION else name: np.repeat(
            np.array([*map(int, figures.summary["lengths"])], np.int64), [*figures.summary["lengths"].values()]
        )
        for name, figures in texts.items()
        if figures.summary["captions"]
    }
    if not found:
        return None
    longest = max(int(np.quantile(values, _LONGEST)) for values in found.values()) + 1
    width = max(1, -(-longest // _BINS))
    edges = np.arange(0, longest + width + 1, width) - 0.5
    return Chart(
        "Lengths",
        "Words of a caption, without the longest 0.5 %.",
        "words",
        "share of captions",
        [_histogram(name, values, edges, colour) for (name, values), colour in zip_colours(found)],
        ["captions", "number", "mean", "median", "longest"],
        [[n, f"{len(v):,}", f"{v.mean():.1f}", f"{np.median(v):.0f}", f"{v.max()}"] for n, v in found.items()],
        y_share=True,
    )


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays [R, K] of row groups one below the other, with as many columns as all have."""
    count = min((part.shape[1] for part in parts), default=0)
    return np.concatenate([part[:, :count] for part in parts]) if parts else np.empty((0, 0))
