"""``reinforce inspect``: look at rows of a dataset, and write what was found as a folder of HTML pages."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reinforce.dataset.kinds.registry import SECTIONS
from reinforce.dataset.layers import mapping_at
from reinforce.dataset.manifest import entry_keys
from reinforce.dataset.reading import Dataset
from reinforce.dataset.vectors import NORM_TOLERANCE
from reinforce.dataset.view import open_view
from reinforce.errors import UserError
from reinforce.explore import captions, plots
from reinforce.explore.captions import DEFINITIONS
from reinforce.explore.gallery import (
    Card,
    Overview,
    Quarantined,
    choose,
    draw_thumbnails,
    make_cards,
    measures,
    read_overview,
)
from reinforce.explore.plots import Chart, quantile_rows
from reinforce.explore.rows import Place, RuleSamples, SampledRows, read_rows, select
from reinforce.explore.select import report_lines
from reinforce.reports import TEMPLATES, drawable, render
from reinforce.storage import Storage, write_file
from reinforce.terminal import escape, plural

_FOUND_ROWS = 1000  # of a file with the texts that the search reads
_KEY_CHARS = 40  # in the summary for people
_CONTENTS = "report.json"
_FIRST = "index.html"
_KIND = "reinforce-inspect"
_WRITTEN = re.compile(r"(images|data)/[a-z0-9-]+\.(webp|js)|[a-z]+\.(html|css|js)")


@dataclass(frozen=True)
class Inspected:
    """The sample of a report: ``rows`` of ``samples`` (estimated unless ``exact``), in row groups of shards."""

    output: str
    rows: int
    samples: int
    exact: bool
    groups: int
    shards: int
    pictures: int
    problems: int
    text: tuple[str, ...] = ()  # the rules of a view, and values and keys at the quantiles of scores

    def lines(self) -> list[str]:
        """A summary for people."""
        about = "" if self.exact else "about "
        looked = (
            f"looked at {self.rows:,} of {about}{plural(self.samples, 'sample')}, in "
            f"{plural(self.groups, 'row group')} of {plural(self.shards, 'shard')}; {self.pictures:,} have pictures"
        )
        problems = [f"{plural(self.problems, 'problem')}, which the report lists"] if self.problems else []
        return [looked, *self.text, *problems, f"open {self.output}/index.html"]

    def _repr_html_(self) -> str:
        *lines, _ = self.lines()
        return render("notebook/report.html", lines=lines, address=f"{self.output}/index.html")


def inspect(
    url: str,
    output: str,
    teachers: Sequence[str] | None = None,
    captioners: Sequence[str] | None = None,
    *,
    limit: int = 10_000,
    seed: int = 0,
    images_from: Sequence[str] = (),
    view: str | None = None,
    version: str = "",
) -> Inspected:
    """Write a report on a dataset to a folder or fsspec URI, in place of an earlier report.

    Looks at no more than ``limit`` samples, in seeded row groups. Equal arguments give equal files. With ``view``,
    looks at the samples that it keeps, and at some on both sides of each of its rules. Pages show the ``version`` of
    the program. Raises UserError.
    """
    folder = _ReportFolder(output)
    models = {**dict.fromkeys(SECTIONS), "teachers": teachers, "captioners": captioners}
    data = Dataset(url, models, images_from=images_from, images_key="--images-from {}")
    sides = None if view is None else RuleSamples(data, open_view(data.store, data.manifest, view), seed)
    overview = read_overview(data, seed)
    selection = select(data, limit, seed, None if sides is None else sides.view)
    rows = read_rows(data, selection, sides)
    items: dict[tuple[str, str], list[Quarantined]] = {}  # of samples, by shard and key
    for item in overview.quarantine.items:
        if item.key is not None:
            items.setdefault((item.shard, item.key), []).append(item)
    files: dict[str, bytes] = {}
    at_quantiles = {row for values in rows.scores().values() for _, row in quantile_rows(values)}
    tabs = choose(rows, seed, set(items), at_quantiles)
    cards = make_cards(data, rows, tabs, items, files.__setitem__)
    nearest: list[tuple[Place, list[tuple[str, list[tuple[str, Place]]]]]] = []  # with cosines, by teacher
    for row, by_teacher in plots.find_neighbours(rows, tabs["random"]) if rows.image_teachers else ():
        lines = [(name, [(f"{cosine:.3f}", rows.places[one]) for one, cosine in of]) for name, of in by_teacher.items()]
        nearest.append((rows.places[row], lines))
    similar, clusters = plots.find_similar(rows), plots.find_clusters(rows, seed)
    wanted = {place for one, found in nearest for place in (one, *(other for _, of in found for _, other in of))}
    wanted |= {place for _, found in (clusters.largest if clusters else ()) for _, place in found}
    wanted |= {rows.places[row] for pair in (similar.pairs if similar else ()) for row in pair[:2]}
    wanted |= {place for rule in (sides.rules if sides else ()) for side in rule.sides for _, place in side.shown}
    thumbnails = draw_thumbnails(data, rows, cards, wanted, files.__setitem__)
    texts, cosines = captions.text_figures(rows), captions.similarities(rows)
    charts = [*plots.similarity_charts(rows, seed)]
    problems = [*overview.problems, *dict.fromkeys(rows.problems)]
    about: dict[str, Any] = {
        "version": version, "teachers": data.teachers, "captioners": data.captioners, "limit": limit, "seed": seed,
    }  # fmt: skip
    shared = {
        **about,
        "title": data.store.url.rstrip("/").rpartition("/")[2] or data.store.url,
        "data": data,
        "selection": selection,
        "rows": rows,
        "sides": sides,
        "thumbnails": thumbnails,
    }
    described = [
        (section[:-1], name, mapping_at(data.manifest, *entry_keys(section, name)))
        for section, names in data.models.items()
        for name in names
    ]
    manifest = json.dumps(data.manifest, indent=2, ensure_ascii=False)
    found = {
        "summary": {"overview": overview, "problems": problems, "models": described, "manifest": manifest},
        "gallery": _gallery(overview, rows, cards),
        "contents": {"similar": similar, "clusters": clusters, "classes": plots.count_classes(rows)},
        **({"captions": _captions(rows, texts, cosines)} if rows.has_texts else {}),
        **({"neighbours": {"nearest": nearest, **_charts(similarity=charts)}} if rows.image_teachers else {}),
        "plots": _plots(rows),
        **({} if sides is None else {"view": {}}),
    }
    names = {name: _FIRST if name == "summary" else f"{name}.html" for name in found}
    shared["pages"] = [(address, name.capitalize()) for name, address in names.items()]
    pages = {
        names[name]: render(f"report/{name}.html", page=names[name], **shared, **values)
        for name, values in found.items()
    }
    files |= {name: text.encode() for name, text in {**pages, **_search_files(rows)}.items()}
    files |= {name: (TEMPLATES / "report" / name).read_bytes() for name in ("report.css", "report.js")}
    about |= {
        "dataset": data.store.url,
        **({} if sides is None else {"view": asdict(sides.view.rows)}),
        "rows": len(rows),
        "samples": selection.samples,
        "exact": selection.exact,
        "captions": captions.captions_summary(texts, cosines),
    }
    folder.publish(files, about)
    text = [*report_lines(sides.view)] if sides else []
    for (layer, name), values in rows.scores().items():
        at = [f"{share} {values[row]:.4g} ({rows.keys[row][:_KEY_CHARS]})" for share, row in quantile_rows(values)]
        text += [f"{layer}: {name}: {', '.join(at)}"] if at else []
    return Inspected(
        folder.storage.url, len(rows), selection.samples, selection.exact, len(selection.groups),
        len(selection.by_shard()), sum(card.picture is not None for card in cards), len(problems),
        tuple(text),
    )  # fmt: skip


def _gallery(overview: Overview, rows: SampledRows, cards: Sequence[Card]) -> dict[str, Any]:
    shown = {(card.shard, card.shown.key) for card in cards}
    others = [item for item in overview.quarantine.items if (item.shard, item.key) not in shown]
    counts = Counter(name for card in cards for name in card.ranks)
    counts["quarantine"] += len(others)
    return {
        "cards": cards,
        "others": others,
        "counts": counts,
        "measures": measures(rows),
        "parts": -(-len(rows) // _FOUND_ROWS),
    }


def _captions(
    rows: SampledRows, texts: Mapping[str, captions.TextFigures], cosines: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, Any]:
    lengths = [captions.length_chart(texts), *captions.distinct_charts(texts)]
    return {
        **_charts(similarity=[*captions.similarity_charts(cosines)], texts=lengths),
        "correlations": [*zip(*captions.correlations(rows), strict=True)],
        "texts": texts,
        "definitions": DEFINITIONS,
    }


def _plots(rows: SampledRows) -> dict[str, Any]:
    scores = [*plots.number_charts(rows)]
    return {
        **_charts(
            scores=[chart for chart, _ in scores],
            crops=[plots.area_chart(rows), plots.operation_chart(rows)],
            targets=[plots.entropy_chart(rows), plots.agreement_chart(rows)],
        ),
        "quantiles": [at for _, at in scores],
        "tolerance": NORM_TOLERANCE,
    }


def _charts(**sections: Sequence[Chart | None]) -> dict[str, Any]:
    """The charts of a page by section, and whether they are drawn."""
    charts = {name: [*filter(None, found)] for name, found in sections.items()}
    return {"charts": charts, "drawn": drawable("charts of the report are")}


def _search_files(rows: SampledRows) -> dict[str, str]:
    """Scripts with key, shard and captions of all rows, which the search of the gallery loads."""
    files = {}
    for part, start in enumerate(range(0, len(rows), _FOUND_ROWS)):
        entries = []
        for row in range(start, min(start + _FOUND_ROWS, len(rows))):
            synthetic = [text for texts in rows.synthetic.values() for text in texts[row] or () if text is not None]
            texts = [*(rows.captions[row] or (None,)), *synthetic]
            shown = [None if text is None else escape(text) for text in texts]
            entries.append([row, escape(rows.keys[row]), rows.places[row][0].shard, shown])
        files[f"data/rows-{part}.js"] = f"inspection.add({json.dumps(entries, separators=(',', ':'))});\n"
    return files


class _ReportFolder:
    """The folder of a report, local or at an fsspec URI: files that fit together, and none that an earlier one left.

    Raises UserError if it holds something else than a report."""

    def __init__(self, url: str) -> None:
        self.storage = Storage(url)
        found = self.storage.read_json(_CONTENTS)
        if found is None and self.storage.names():
            raise UserError(
                f"{self.storage.url} is not empty, and no report of `reinforce inspect`. Name another folder for it."
            )
        if found is not None and found.get("kind") != _KIND:
            raise UserError(f"{self.storage.path(_CONTENTS)} is of another program. Name another folder.")
        names = (found or {}).get("files", [])
        self._before = {name for name in names if isinstance(name, str) and _WRITTEN.fullmatch(name)}

    def publish(self, files: Mapping[str, bytes], about: Mapping[str, Any]) -> None:
        """Write the files of a report by name, and remove those of an earlier one that it does not have."""
        names = sorted(files)
        contents = json.dumps({"kind": _KIND, **about, "files": names}, indent=2) + "\n"
        written = {_CONTENTS: contents.encode(), **files}
        written[_FIRST] = written.pop(_FIRST)  # the last
        if self.storage.local:
            for name, data in written.items():
                write_file(data, self.storage.path(name))
        else:  # files that have their names: drivers take the type, which a browser needs, from the ending
            with tempfile.TemporaryDirectory(prefix="reinforce-") as folder:
                for name, data in written.items():
                    path = Path(folder, name)
                    path.parent.mkdir(exist_ok=True)
                    path.write_bytes(data)
                with self.storage.storage_errors("written", _FIRST):
                    self.storage.put_folder(folder)
        for name in sorted(self._before - set(names)):
            self.storage.remove(name)
