"""Results of a suite: lines of JSON that are kept, the table with what is published, and a picture."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from reinforce import plots
from reinforce.errors import UserError
from reinforce.evaluation.registry import SuiteSet
from reinforce.source.urls import canonical, filesystem
from reinforce.source.whole_reads import read_whole
from reinforce.storage import write_file

#: A line of a result file: ``key``, ``dataset`` and ``metrics`` as DataComp writes them, and what they were made of.
Line = dict[str, Any]

_OTHER_SIZE = "*"
_PLAIN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*(?<!-[0-9a-f]{8})")
_STEM_CHARACTERS = 100


class ResultFile:
    """The lines of one model in the folder of results, by the keys of sets; each new line replaces the file."""

    def __init__(self, folder: str, model: str) -> None:
        folder = folder.rstrip("/")
        self.url = f"{folder}/{file_name(model)}"
        self._model = model
        # earlier versions wrote other names, which several models could share
        former = f"{folder}/{_stem(model)}.jsonl"
        self._lines = self._read(self.url) or self._read(former)

    def made_of(self, one: SuiteSet, identity: str, metric: str) -> Line | None:
        """The line of a set that this model has with this version of the metric, else None.

        Its ``files`` are the state of the files that were read, its ``content`` is the digest of what was in them.
        """
        line = self._lines.get(one.key)
        if line is None or not line.get("content"):
            return None
        return line if (line.get("model"), line.get("metric")) == (identity, metric) else None

    def outdated(self, one: SuiteSet, identity: str, metric: str) -> bool:
        """Whether a line of this model is not used since an earlier version wrote it."""
        line = self._lines.get(one.key)
        return line is not None and line.get("model") == identity and self.made_of(one, identity, metric) is None

    def main_metric(self, key: str) -> float | None:
        """The main metric of a set, of any files; None if it has no line."""
        return self._lines[key]["metrics"]["main_metric"] if key in self._lines else None

    def add(self, line: Line) -> None:
        """Write a line in place of an earlier one of its set. Raises UserError."""
        self._lines[line["key"]] = line
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in self._lines.values())
        try:
            write_file(text.encode(), self.url)
        except OSError as error:
            raise UserError(
                f"{canonical(self.url)} cannot be written: {error}. Name another folder with --out."
            ) from error

    def _read(self, url: str) -> dict[str, Line]:
        """The lines of a file that are of this model, or that name none."""
        fs, path = filesystem(url)
        if not fs.exists(path):
            return {}
        try:
            lines = [json.loads(line) for line in read_whole(fs, path).decode().splitlines() if line.strip()]
            return {
                line["key"]: line for line in lines if line.get("model", "@").rpartition("@")[0] in ("", self._model)
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{canonical(url)} has a line that is not of results ({error}). Remove the file."
            ) from error


def file_name(model: str) -> str:
    """The file of a model's results, which no other model has, also where a storage ignores the case of letters.

    Names of paths and others with more than lower-case letters, digits, '.', '_' and '-' end with a hash of the name.
    """
    if _PLAIN_NAME.fullmatch(model):
        return f"{model}.jsonl"
    stem = _stem(model)[-_STEM_CHARACTERS:].lstrip(".-") or "model"
    return f"{stem}-{hashlib.blake2b(model.encode(), digest_size=4).hexdigest()}.jsonl"


def _stem(model: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-")


@dataclass
class SuiteReport:
    """Lines by model and key; ``absent`` and ``failed`` say why a set has none. ``published`` are main metrics."""

    suite: str
    total: int  # sets of the whole suite
    sets: list[SuiteSet]
    results: dict[str, dict[str, Line]]
    absent: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    compared: str | None = None
    published: Mapping[str, float] = field(default_factory=dict)

    @property
    def evaluated(self) -> list[SuiteSet]:
        """The sets with a result of every model."""
        return [one for one in self.sets if all(one.key in lines for lines in self.results.values())]

    def mean(self, model: str) -> float | None:
        """Mean of a model's main metrics over the evaluated sets."""
        scores = [self.results[model][one.key]["metrics"]["main_metric"] for one in self.evaluated]
        return sum(scores) / len(scores) if scores else None

    def rows(self) -> list[list[str]]:
        """The cells of the table, the header first; metrics are in percent."""
        differences = [f"{model} - published" if len(self.results) > 1 else "difference" for model in self.results]
        header = ["set", "metric", *self.results]
        rows = [header + ([self.compared, *differences] if self.compared else [])]
        for one in self.sets:
            lines = [of_model.get(one.key) for of_model in self.results.values()]
            scores = [None if line is None else line["metrics"]["main_metric"] for line in lines]
            other = any(line is not None and line["notes"] for line in lines)
            why = "missing" if one.key in self.absent else "failed" if one.key in self.failed else ""
            cells = [f"{_percent(score)}{_OTHER_SIZE * other}" if score is not None else why for score in scores]
            rows.append(
                [one.name, one.main_metric, *cells, *self._compared(scores, self.published.get(one.key), other)]
            )
        means = [self.mean(model) for model in self.results]
        evaluated = self.evaluated
        theirs = [self.published[one.key] for one in evaluated if one.key in self.published]
        of_same = sum(theirs) / len(theirs) if theirs and len(theirs) == len(evaluated) else None
        count = f"mean of {len(evaluated)}" + (f" of {self.total}" if len(evaluated) < self.total else "") + " sets"
        cells = [_percent(mean) + _OTHER_SIZE * self._noted for mean in means]
        rows.append([count, "", *cells, *self._compared(means, of_same, self._noted)])
        return rows

    def table(self) -> Table:
        """Main metrics in percent, one column per model, and what is published."""
        header, *rows = self.rows()
        table = Table(box=None, header_style="bold", pad_edge=False)
        for number, name in enumerate(header):
            # Names of models may be long paths: they are folded where a terminal is narrow.
            whole = not any(model in name for model in self.results)
            table.add_column(name, justify="left" if number < 2 else "right", no_wrap=whole, overflow="fold")
        for row in rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """The table and the lines below it as Markdown."""
        header, *rows = ([cell.replace("|", "\\|").replace("*", "\\*") for cell in row] for row in self.rows())
        rule = ["---", "---", *["---:"] * (len(header) - 2)]
        table = "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))
        return "\n".join([table, "", *(f"- {line}" for line in self.lines()), ""])

    def lines(self) -> list[str]:
        """Caveats of the numbers: sets that are missing, failed, or differ from the published ones."""
        lines: dict[str, None] = {}
        for one in self.sets:
            if one.key in self.absent:
                lines[f"{one.name} is missing, and not in the mean: {self.absent[one.key]}"] = None
            if one.key in self.failed:
                lines[f"{one.name} failed, and is not in the mean: {self.failed[one.key]}"] = None
            for of_model in self.results.values():
                line = of_model.get(one.key, {})
                lines |= {f"{_OTHER_SIZE} {one.name}: {note}": None for note in line.get("notes", ())}
                lines |= {f"{one.name}: {note}": None for note in line.get("refused", ())}
        if len(self.evaluated) < self.total:
            lines[f"The mean is not that of the {self.total} sets of {self.suite}."] = None
        return list(lines)

    def as_json(self) -> dict[str, Any]:
        """Lines by model in the order of the sets, their mean, and the sets without a result."""
        models = {
            model: {"mean": self.mean(model), "results": [lines[one.key] for one in self.sets if one.key in lines]}
            for model, lines in self.results.items()
        }
        published = {one.key: self.published[one.key] for one in self.sets if one.key in self.published}
        compared = {"name": self.compared, "main_metrics": published} if self.compared else None
        sets = [one.key for one in self.evaluated]
        missing = {"missing": self.absent, "failed": self.failed}
        return {"suite": self.suite, "sets": sets, "models": models, **missing, "published": compared}

    def draw(self, url: str) -> None:
        """Draw the main metric of each set and model, with chance and what is published."""
        sets = self.evaluated[::-1]
        figure, (axes,) = plots.figure(height=1.5 + 0.22 * len(sets))
        rows = range(len(sets))
        axes.scatter(
            [100 * one.chance if one.chance is not None else float("nan") for one in sets],
            rows, marker="|", color="#6b7280", label="chance",
        )  # fmt: skip
        if self.compared:
            theirs = [100 * self.published.get(one.key, float("nan")) for one in sets]
            axes.scatter(
                theirs, rows, s=60, facecolors="none", edgecolors="#1f2328", label=f"{self.compared}, published"
            )
        for number, (model, lines) in enumerate(self.results.items()):
            scores = [100 * lines[one.key]["metrics"]["main_metric"] for one in sets]
            axes.scatter(scores, rows, s=24, color=plots.colour(number), label=model)
        axes.set_yticks([*rows], [one.name for one in sets])
        axes.set_xlim(0, 100)
        plots.label(axes, f"{self.suite}: main metrics of {len(sets)} sets", "main metric (%)", "")
        plots.legend(axes)
        plots.save(figure, url)

    @property
    def _noted(self) -> bool:
        return any(line["notes"] for lines in self.results.values() for line in lines.values())

    def _compared(self, scores: list[float | None], published: float | None, other: bool) -> list[str]:
        """Cells of what is published and of differences, which a set of another size does not have."""
        if not self.compared:
            return []
        no_difference = published is None or other
        shown = ["" if s is None or no_difference else f"{100 * (s - (published or 0)):+.2f}" for s in scores]
        return [_percent(published), *shown]


def _percent(score: float | None) -> str:
    return "" if score is None else f"{100 * score:.2f}"
