"""The charts of a report, from the rows that were looked at, drawn by matplotlib as inline SVG; similar images and
clusters among them, and how many samples each class has."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from reinforce import reports
from reinforce.dataset.vectors import normalized
from reinforce.explore import neighbours
from reinforce.explore.rows import BATCH, SCALES, Place, SampledRows
from reinforce.images.backends import known_operations
from reinforce.processes.imports import installed
from schemas.seeds import permutation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PAIRS = 24  # that are shown
_SHOWN, _NEAREST = 24, 6  # images, and the nearest ones of each
_CHUNK = 512  # rows that are compared with all others at once
_COSINES = (0.9, 0.95, 0.98)
_CLUSTERS, _OF_CLUSTER = 48, 10  # at most so many clusters, of so many images on average at least
_CLASSES = 20  # of the largest ones, and of the smallest ones


@dataclass(frozen=True)
class Similar:
    """Pairs of rows with the highest cosine between the mean vectors of a teacher, the highest first, and the number of
    images that have another one at some cosines or above."""

    teacher: str
    pairs: Sequence[tuple[int, int, float]]
    counts: Sequence[tuple[float, int]]


def find_similar(rows: SampledRows) -> Similar | None:
    """The most similar images of all rows; None without a teacher of images or with fewer than two vectors."""
    finite, vectors = _compared_vectors(rows)
    if rows.compared is None or len(finite) < 2:
        return None
    pairs: list[tuple[float, int, int]] = []
    nearest = np.full(len(finite), -1.0, np.float32)
    for start in range(0, len(finite), _CHUNK):
        cosines = vectors[start : start + _CHUNK] @ vectors.T
        np.fill_diagonal(cosines[:, start:], -1)
        nearest[start : start + _CHUNK] = cosines.max(axis=1)
        cosines[np.arange(len(finite)) <= start + np.arange(len(cosines))[:, None]] = -1  # each pair once
        best = np.argpartition(-cosines, min(_PAIRS, cosines.size) - 1, axis=None)[:_PAIRS]
        first, second = np.unravel_index(best, cosines.shape)
        found = zip(cosines[first, second].tolist(), (first + start).tolist(), second.tolist(), strict=True)
        pairs = sorted([*pairs, *found], key=lambda pair: (-pair[0], pair[1:]))[:_PAIRS]
    shown = [(int(finite[one]), int(finite[other]), cosine) for cosine, one, other in pairs if other > one]
    return Similar(rows.compared, shown, [(cosine, int((nearest >= cosine).sum())) for cosine in _COSINES])


def _compared_vectors(rows: SampledRows) -> tuple[np.ndarray, np.ndarray]:
    """The rows that have a vector of the teacher that compares images [N], and these vectors of unit norm [N, D]."""
    if rows.compared is None:
        return np.empty(0, np.intp), np.empty((0, 0), np.float32)
    vectors = normalized(rows.image_vectors(rows.compared))
    finite = np.flatnonzero(np.isfinite(vectors).all(axis=1))
    return finite, np.ascontiguousarray(vectors[finite])


@dataclass(frozen=True)
class Clusters:
    """The ``count`` clusters of images by the mean vectors of a teacher: the largest ones with their size and the
    samples nearest to their middle, the nearest first, each after a text; and the size of the smallest one."""

    teacher: str
    count: int
    largest: Sequence[tuple[int, Sequence[tuple[str, Place]]]]
    smallest: int


def find_clusters(rows: SampledRows, seed: int) -> Clusters | None:
    """Clusters by k-means; None where there are too few vectors, or without faiss."""
    finite, vectors = _compared_vectors(rows)
    count = min(_CLUSTERS, len(finite) // _OF_CLUSTER)
    if rows.compared is None or count < 2 or not installed("faiss"):
        return None
    units = vectors.astype(np.float16)
    centroids = neighbours.train(units, count, seed)
    cells = neighbours.nearest(units, centroids)
    sizes = np.bincount(cells, minlength=count)
    largest = []
    for cell in np.argsort(-sizes, kind="stable")[:_SHOWN].tolist():
        members = np.flatnonzero(cells == cell)
        order = np.argsort(-(vectors[members] @ centroids[cell]), kind="stable")
        nearest = finite[members[order[:_NEAREST]]].tolist()
        largest.append((len(members), [("", rows.places[row]) for row in nearest]))
    return Clusters(rows.compared, count, largest, int(sizes.min()))


@dataclass(frozen=True)
class Classes:
    """Samples by class, the largest first: all classes or the largest and smallest ones, with how many are ``hidden``
    between them, and the samples ``without`` one."""

    count: int
    largest: Sequence[tuple[str, int]]
    smallest: Sequence[tuple[str, int]]
    hidden: int
    without: int


def count_classes(rows: SampledRows) -> Classes | None:
    """The classes of the rows; None where fewer than two are stated, or where most samples have one of their own."""
    counts = Counter(name for name in rows.classes if name is not None)
    if len(counts) < 2 or 2 * len(counts) > counts.total():
        return None
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    cut = len(ordered) > 2 * _CLASSES
    largest, smallest = (ordered[:_CLASSES], ordered[-_CLASSES:]) if cut else (ordered, [])
    hidden = len(ordered) - len(largest) - len(smallest)
    return Classes(len(counts), largest, smallest, hidden, len(rows) - counts.total())


def find_neighbours(
    rows: SampledRows, order: Sequence[int]
) -> list[tuple[int, Mapping[str, Sequence[tuple[int, float]]]]]:
    """The first rows of ``order``, each with the nearest rows and their cosines, the nearest first: by each teacher
    that encodes images alone, by the mean vectors of crops."""
    vectors = {teacher: normalized(rows.image_vectors(teacher)) for teacher in rows.image_teachers}
    found: list[tuple[int, Mapping[str, Sequence[tuple[int, float]]]]] = []
    for row in order[:_SHOWN]:
        by_teacher = {}
        for teacher, unit in vectors.items():
            cosines = unit @ unit[row]
            cosines[row] = np.nan
            finite = np.flatnonzero(np.isfinite(cosines))
            nearest = finite[np.argsort(-cosines[finite], kind="stable")][:_NEAREST]
            by_teacher[teacher] = [(int(one), float(cosines[one])) for one in nearest]
        found.append((row, by_teacher))
    return found


def similarity_charts(rows: SampledRows, seed: int) -> Iterator[Chart]:
    """For each teacher, cosines of two crops of one image and of two images, each the mean over their crops."""
    order = permutation(len(rows), seed, "pairs of images")
    for teacher, count in rows.image_teachers.items():
        vectors = rows.image_vectors(teacher)
        named = {"two images": np.einsum("rd,rd->r", vectors[order[1:]], vectors[order[:-1]])}
        if count > 1:
            named["two crops of one image"] = (count * np.square(vectors).sum(axis=1) - 1) / (count - 1)
        finite = {name: values[np.isfinite(values)] for name, values in named.items()}
        if found := {name: values for name, values in finite.items() if len(values)}:
            text = "Mean cosines of crops. Where they do not differ, the teacher cannot tell these images apart."
            yield distribution(teacher, text, "cosine", "pairs", found)


BINS = 40  # of a histogram
_AREA_BINS = 8
_QUANTILES = (0.05, 0.95, 0.25, 0.75, 0.5, 0.0, 1.0)  # at which samples are shown, the most important last
_FEW = 30  # an operation with fewer crops is not shown
TRUE_LABEL = "true captions"
_DASHES = ("-", "--", ":", "-.")
TRUE_COLOUR = "#868e96"  # of true captions
#: Variables of report.css, so that a chart follows light and dark.
_VARIABLES = {
    reports.INK: "ink",
    reports.GREY: "soft",
    reports.EDGE: "line",
    TRUE_COLOUR: "grey",
    **{colour: f"c{number}" for number, colour in enumerate(reports.COLOURS)},
}
_WIDTH = 4.4  # inches
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Chart:
    """A chart that ``draw`` draws on axes. ``table`` has the same numbers for readers who cannot see it, under its
    ``heads``. ``height`` is in inches."""

    title: str
    text: str
    x_label: str
    y_label: str
    heads: Sequence[str]
    table: Sequence[Sequence[str]]
    draw: Callable[[Axes], None]
    height: float = 2.8

    def svg(self) -> Markup:
        """The drawing as an element of a page: equal charts are equal text."""
        from matplotlib import rc_context

        with rc_context({**_STYLE, "svg.hashsalt": self.title}):
            figure, (axes,) = reports.figure(width=_WIDTH, height=self.height)
            self.draw(axes)
            reports.label(axes, "", self.x_label, self.y_label)
            if len(labels := axes.get_legend_handles_labels()[1]) > 1:
                columns = 1 if max(map(len, labels)) > 20 else 3
                figure.legend(
                    loc="outside upper left", ncols=columns, frameon=False, fontsize=9, labelcolor=reports.INK
                )
            file = io.StringIO()
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        svg = file.getvalue()
        svg = re.sub(r' id="[a-z0-9_.]+_\d+"', "", svg[svg.index("<svg") :])  # which other charts of the page have too
        return Markup(re.sub("|".join(_VARIABLES), lambda found: f"var(--{_VARIABLES[found[0]]})", svg))  # noqa: S704


def quantile_rows(values: np.ndarray) -> list[tuple[str, int]]:
    """The rows at some quantiles of their finite values, each with the quantile as text; none twice."""
    finite = np.flatnonzero(np.isfinite(values))
    ordered = finite[np.argsort(values[finite], kind="stable")]
    places = {round(share * (len(ordered) - 1)): share for share in _QUANTILES} if len(ordered) else {}
    return [(f"{places[place]:.0%}".replace("%", " %"), int(ordered[place])) for place in sorted(places)]


def number_charts(rows: SampledRows) -> Iterator[tuple[Chart, list[tuple[str, Place]]]]:
    """The distribution of each score, and the samples at its quantiles."""
    for (layer, name), every in rows.scores().items():
        found = every[np.isfinite(every)]
        if not len(found):
            continue
        about = f"Of {len(found):,} samples; {len(every) - len(found):,} have none."
        chart = distribution(f"{layer}: {name}", about, name, "samples", {name: found})
        yield chart, [(f"{share}: {every[row]:.4g}", rows.places[row]) for share, row in quantile_rows(every)]


def distribution(title: str, text: str, x_label: str, unit: str, named: Mapping[str, np.ndarray]) -> Chart:
    """How finite values of several names are distributed, with mean and standard deviation."""
    every = np.concatenate([*named.values()])
    edges = np.linspace(every.min(), max(every.max(), every.min() + 1e-3), BINS + 1)
    heads = [unit, "number", "mean", "deviation", "5 %", "median", "95 %"]
    table = []
    for name, v in named.items():
        quantiles = (f"{quantile:.3f}" for quantile in np.quantile(v, (0.05, 0.5, 0.95)))
        table.append([name, f"{len(v):,}", f"{v.mean():.3f}", f"{v.std():.3f}", *quantiles])
    return histograms(title, text, x_label, unit, named, edges, heads, table)


def histograms(
    title: str,
    text: str,
    x_label: str,
    unit: str,
    named: Mapping[str, np.ndarray],
    edges: np.ndarray,
    heads: Sequence[str],
    table: Sequence[Sequence[str]],
) -> Chart:
    """Histograms of values of several names; those of true captions are a filled area."""

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import PercentFormatter

        for number, (name, found) in enumerate(named.items()):
            style = line_style(number - (TRUE_LABEL in named)) if name != TRUE_LABEL else {"color": TRUE_COLOUR}
            if name == TRUE_LABEL or len(named) == 1:
                style |= {"fill": True, "alpha": 0.42}
            axes.stairs(np.histogram(found, edges)[0] / len(found), edges, label=name, **style)
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))

    return Chart(title, text, x_label, f"share of {unit}", heads, table, draw)


def line_style(number: int) -> dict[str, Any]:
    """The style of a line by its number, distinct also without colours."""
    return {"color": reports.colour(number), "linestyle": _DASHES[number % len(_DASHES)], "linewidth": 1.6}


def area_chart(rows: SampledRows) -> Chart | None:
    """The similarity of the true caption to a crop, by the crop's share of the image."""
    areas = rows.joined(rows.areas)
    lines: dict[int, np.ndarray] = {}
    table = []
    for number, teacher in enumerate(rows.teachers):
        values = rows.crop_similarities(teacher)
        if values.shape != areas.shape or not np.isfinite(values).any():
            continue
        finite = np.isfinite(values)
        x, y = areas[finite], values[finite]
        edges = np.unique(np.quantile(x, np.linspace(0, 1, _AREA_BINS + 1)))
        places = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, max(0, len(edges) - 2))
        found = [(x[places == n], y[places == n]) for n in np.unique(places)]
        lines[number] = np.array([[a.mean(), b.mean(), *np.quantile(b, (0.25, 0.75))] for a, b in found])
        table += [[teacher, f"{a:.0%}", f"{b:.3f}", f"{low:.3f} to {high:.3f}"] for a, b, low, high in lines[number]]
    if not lines:
        return None

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import PercentFormatter

        for number, (area, mean, low, high) in ((number, line.T) for number, line in lines.items()):
            axes.plot(area, mean, label=rows.teachers[number], marker="o", markersize=4, **line_style(number))
            axes.fill_between(area, low, high, color=reports.colour(number), alpha=0.13, linewidth=0)
        axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))

    return Chart(
        "Crop size",
        "Mean over crops of similar size; the band holds the middle half of them.",
        "crop, share of the image's area",
        "similarity to the true caption",
        ["teacher", "crop size", "mean", "middle half"],
        table,
        draw,
    )


def operation_chart(rows: SampledRows) -> Chart | None:
    """How each operation changes the similarity of a crop to the true caption."""
    bits = rows.joined(rows.operations).astype(np.int32)
    used = [(name, (bits & (1 << n)) > 0) for n, name in enumerate(known_operations())]
    used = [(name, has) for name, has in used if has.sum() >= _FEW]
    teachers = [
        (number, teacher, rows.crop_similarities(teacher))
        for number, teacher in enumerate(rows.teachers)
        if rows.crop_similarities(teacher).shape == bits.shape and bits.shape[1] > 1
    ]
    if not used or not teachers:
        return None
    effects = []
    for name, has in used:
        found = {}
        for number, _, values in teachers:
            change = (values - values.mean(axis=1, keepdims=True))[has]
            change = change[np.isfinite(change)]
            if len(change) >= _FEW:
                found[number] = float(change.mean()), 1.96 * float(change.std()) / len(change) ** 0.5
        if found:
            effects.append((name, found))
    if not effects:
        return None
    effects.sort(key=lambda effect: np.mean([mean for mean, _ in effect[1].values()]))

    def draw(axes: Axes) -> None:
        for nth, (number, teacher, _) in enumerate(teachers):
            shift = 0.6 * ((nth + 0.5) / len(teachers) - 0.5)
            points = [(*found[number], row + shift) for row, (_, found) in enumerate(effects) if number in found]
            means, errors, places = zip(*points, strict=True) if points else ((), (), ())
            axes.errorbar(
                means, places, xerr=errors, fmt="o", markersize=4, color=reports.colour(number), label=teacher
            )
        axes.axvline(0, color=reports.GREY, linewidth=1)
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x", color=reports.EDGE, linewidth=0.8)
        axes.set_yticks(range(len(effects)), [name for name, _ in effects])
        axes.invert_yaxis()

    return Chart(
        "Operations",
        "Change against the mean over the sample's augmentations, with 95 % intervals: what costs similarity is on "
        "the left.",
        "change of the similarity to the true caption",
        "",
        ["operation", *(teacher for _, teacher, _ in teachers)],
        [
            [name, *("{:+.4f} \u00b1 {:.4f}".format(*found[n]) if n in found else "-" for n, *_ in teachers)]
            for name, found in effects
        ],
        draw,
        height=1.2 + 0.22 * len(effects),
    )


def agreement_chart(rows: SampledRows) -> Chart | None:
    """Agreement of the teachers' targets, over samples."""
    values = rows.targets.agreements()
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return None
    return distribution(
        "Agreement of the teachers",
        "1 \u2212 the Jensen-Shannon divergence of their targets / log T at the logit scales in force; 1 is full "
        f"agreement. Targets are of batches of at least {BATCH} pairs, or all there are.",
        "agreement",
        "samples",
        {"all": values},
    )


def entropy_chart(rows: SampledRows) -> Chart | None:
    """The entropy of each teacher's targets by logit scale, with the scale in force."""
    lines, table = {}, []
    for number, teacher in enumerate(rows.teachers):
        values = rows.targets.entropy(teacher) if teacher in rows.targets.scales else []
        if not values:
            continue
        scale = rows.targets.scales[teacher]
        lines[number] = teacher, values, scale
        force = ["-", "-"] if scale is None else [f"{scale:g}", f"{np.interp(scale, SCALES, values):.3f}"]
        table.append([teacher, *force, f"{values[0]:.3f}", f"{values[-1]:.3f}"])
    if not lines:
        return None

    def draw(axes: Axes) -> None:
        axes.set_xscale("log")
        for number, (teacher, values, scale) in lines.items():
            name = teacher if scale is None else f"{teacher} ({scale:g})"
            axes.plot(SCALES, values, label=name, **line_style(number))
            if scale is not None:
                axes.axvline(
                    min(max(scale, SCALES[0]), SCALES[-1]), color=reports.colour(number), linestyle=(0, (5, 4))
                )
        axes.set_ylim(bottom=0)
        axes.minorticks_off()
        axes.set_xticks(ticks := (1, 2, 5, 10, 20, 50, 100, 200), map(str, ticks))

    return Chart(
        "Entropy of the targets",
        "Mean entropy of the softmax over a batch, in both directions, / log of the batch: 0 is one-hot, 1 uniform. "
        "Vertical lines are the logit scales in force.",
        "logit scale",
        "entropy / log B",
        ["teacher", "scale in force", "entropy there", f"at {SCALES[0]}", f"at {SCALES[-1]}"],
        table,
        draw,
    )
