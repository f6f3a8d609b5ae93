"""Results of a suite: lines of JSON that are kept, the table with what is published, and a picture."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from reinforce import plots
from reinforce.errors import UserError
from reinforce.evaluation.kinds.registry import KINDS
from reinforce.evaluation.registry import SuiteSet
from reinforce.evaluation.report import score_table
from reinforce.images.policy import PUBLISHED_POLICY
from reinforce.source.urls import canonical, filesystem
from reinforce.source.whole_reads import read_whole
from reinforce.storage import write_file

#: A line of a result file: ``key``, ``dataset`` and ``metrics`` as DataComp writes them, and what they were made of.
Line = dict[str, Any]

_OTHER_SIZE = "*"
_PLAIN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*(?<!-[0-9a-f]{8})")
_STEM_CHARACTERS = 100


class ResultFile:
    """The lines of one model in the folder of results, by the keys of sets; each new line replaces the file.

    ``identity`` is of the model as it is now. ``outdated`` are the keys of lines that are not used, since an earlier
    version wrote them.
    """

    def __init__(self, folder: str, model: str, identity: str = "") -> None:
        folder = folder.rstrip("/")
        self.url = f"{folder}/{file_name(model)}"
        self.outdated: set[str] = set()
        self._model, self._identity = model, identity
        # earlier versions wrote other names, which several models could share
        former = f"{folder}/{_stem(model)}.jsonl"
        self._lines = self._read(self.url) or self._read(former)

    def line(self, one: SuiteSet) -> Line | None:
        """The line of a set that this model has with this version of the metric, else None.

        Its ``files`` are the state of the files that were read, its ``content`` is the digest of what was in them.
        """
        line = self._lines.get(one.key)
        if line is None or line.get("model") != self._identity:
            return None
        if line.get("content") and line.get("metric") == metric_version(one):
            return line
        self.outdated.add(one.key)
        return None

    def main_metric(self, key: str) -> float | None:
        """The main metric of a set, of any files; None if it has no line."""
        return self._lines[key]["metrics"]["main_metric"] if key in self._lines else None

    def add(self, one: SuiteSet, line: Line) -> Line:
        """Write the line of a set in place of an earlier one, and return it as it is written. Raises UserError."""
        made_of = {"model": self._identity, "metric": metric_version(one)}
        line = self._lines[one.key] = {"key": one.key, "dataset": one.name, **line, **made_of}
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in self._lines.values())
        try:
            write_file(text.encode(), self.url)
        except OSError as error:
            raise UserError(
                f"{canonical(self.url)} cannot be written: {error}. Name another folder with --out."
            ) from error
        return line

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


def metric_version(one: SuiteSet) -> str:
    """Settings that determine the metrics of a set, besides its content and the model."""
    return f"{one.kind} {KINDS[one.kind].version}, {one.main_metric}, {PUBLISHED_POLICY}"


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
    published: Mapping[str, float] = field(default_factory=dict)
    compared: str | None = None
    absent: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def evaluated(self) -> list[SuiteSet]:
        """The sets with a result of every model."""
        return [one for one in self.sets if all(one.key in lines for lines in self.results.values())]

    def scores(self, model: str) -> dict[str, float]:
        """A model's main metrics by key."""
        return {key: line["metrics"]["main_metric"] for key, line in self.results[model].items()}

    def mean(self, model: str) -> float | None:
        """Mean of a model's main metrics over the evaluated sets."""
        return self._mean(self.scores(model))

    def _mean(self, scores: Mapping[str, float]) -> float | None:
        """Mean over the evaluated sets; None if one of them has no score."""
        found = [scores[one.key] for one in self.evaluated if one.key in scores]
        return sum(found) / len(found) if found and len(found) == len(self.evaluated) else None

    def rows(self) -> list[list[str]]:
        """The cells of the table, the header first; metrics are in percent."""
        differences = [f"{model} - published" if len(self.results) > 1 else "difference" for model in self.results]
        rows = [["set", "metric", *self.results, *((self.compared, *differences) if self.compared else ())]]
        scores = [self.scores(model) for model in self.results]
        noted = {key for lines in self.results.values() for key, line in lines.items() if line["notes"]}
        for one in self.sets:
            why = "missing" if one.key in self.absent else "failed" if one.key in self.failed else ""
            of_set = [of_model.get(one.key) for of_model in scores]
            cells = self._cells(of_set, self.published.get(one.key), one.key in noted, why)
            rows.append([one.name, one.main_metric, *cells])
        count = f"mean of {len(self.evaluated)}" + f" of {self.total}" * (len(self.evaluated) < self.total) + " sets"
        means = [self._mean(of_model) for of_model in scores]
        return [*rows, [count, "", *self._cells(means, self._mean(self.published), bool(noted))]]

    def _cells(self, scores: Sequence[float | None], published: float | None, other: bool, why: str = "") -> list[str]:
        """Cells of scores, of what is published and of differences, which sets of ``other`` sizes do not have."""
        cells = [why if score is None else f"{100 * score:.2f}{_OTHER_SIZE * other}" for score in scores]
        if not self.compared:
            return cells
        if published is None:
            return [*cells, "", *("" for _ in scores)]
        differences = ["" if score is None or other else f"{100 * (score - published):+.2f}" for score in scores]
        return [*cells, f"{100 * published:.2f}", *differences]

    def table(self) -> Table:
        """Main metrics in percent, one column per model, and what is published."""
        header, *rows = self.rows()
        return score_table(header, rows, [*self.results], texts=2)

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
        for number, model in enumerate(self.results):
            scores = self.scores(model)
            axes.scatter([100 * scores[one.key] for one in sets], rows, s=24, color=plots.colour(number), label=model)
        axes.set_yticks([*rows], [one.name for one in sets])
        axes.set_xlim(0, 100)
        plots.label(axes, f"{self.suite}: main metrics of {len(sets)} sets", "main metric (%)", "")
        plots.legend(axes)
        plots.save(figure, url)
