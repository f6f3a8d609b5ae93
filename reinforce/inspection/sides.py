"""Samples on both sides of each rule of a view: some that it leaves out, and some that it keeps.

Where a rule keeps the largest values, these are the samples with the values next to its threshold; else random ones. A
view may be untrusted: its expressions are computed with limits of time and memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.reading.dataset import Dataset
from reinforce.dataset.view import View
from reinforce.errors import UserError
from reinforce.inspection.selection import Group, Place
from reinforce.selection.expressions import Expression
from reinforce.selection.limited import LimitedExpressions, LimitError

_SHOWN = 12  # samples of each side
LEFT_OUT, KEPT, NO_VALUE = "left out", "kept", "left out, without a value"


@dataclass
class Side:
    """The samples of one side of a rule, those that are shown first: the distance by which each is chosen, the value by
    which the rule decides, '' if it has none, and where the sample is."""

    name: str
    samples: list[tuple[float, str, Place]] = field(default_factory=list)

    def add(self, group: Group, places: np.ndarray, distances: np.ndarray, values: np.ndarray | None) -> None:
        """Add the rows at some places of a row group; the smallest distances are shown."""
        for place in places[np.argsort(distances[places], kind="stable")[:_SHOWN]].tolist():
            value = "" if values is None or np.isnan(values[place]) else f"{values[place]:.4g}"
            self.samples.append((float(distances[place]), value, (group, place)))
        self.samples = sorted(self.samples, key=lambda sample: sample[0])[:_SHOWN]

    @property
    def shown(self) -> list[tuple[str, Place]]:
        """The value and place of each sample."""
        return [(value, place) for _, value, place in self.samples]


@dataclass
class RuleSides:
    """A rule of a view, the ``line`` of the view's report on it, and its sides."""

    number: int
    rule: Mapping[str, Any]
    line: Mapping[str, Any]
    expression: Expression | None
    sides: tuple[Side, ...] = field(default_factory=lambda: (Side(LEFT_OUT), Side(KEPT), Side(NO_VALUE)))

    @property
    def text(self) -> str:
        return json.dumps(self.rule, ensure_ascii=False)

    def add(self, group: Group, codes: np.ndarray, null: np.ndarray, order: np.ndarray, value: np.ndarray) -> None:
        """Add the rows of a row group: ``codes`` number the rule that leaves a row out, 0 for none."""
        threshold = self.line.get("threshold")
        values = value if self.expression is not None and isinstance(threshold, int | float) else None
        distances = order if values is None else np.where(np.isnan(values), order, np.abs(values - threshold))
        out, kept, without = self.sides
        here = codes == self.number
        out.add(group, np.flatnonzero(here & ~null), distances, values)
        kept.add(group, np.flatnonzero((codes == 0) | (codes > self.number)), distances, values)
        without.add(group, np.flatnonzero(here & null), order, None)


class Sides:
    """The sides of all rules of a view, from the row groups that are added."""

    def __init__(self, data: Dataset, view: View, seed: int) -> None:
        self.view, self._seed = view, seed
        self.problems: list[str] = []
        self._limited = LimitedExpressions(data.manifest)
        if len(view.rules) != len(view.report):
            raise UserError(f"{data.store.url}: view {view.name} does not state what each rule takes. Make it again.")
        self.rules = [
            RuleSides(number, rule, line, self._expression(data, number, rule))
            for number, (rule, line) in enumerate(zip(view.rules, view.report, strict=True), 1)
        ]

    @property
    def columns(self) -> list[str]:
        """Columns of the samples that the expressions of rules need."""
        return sorted({name for rule in self.rules if rule.expression for name in rule.expression.sample_columns})

    def add(self, group: Group, tables: Mapping[str, pa.Table], reasons: pa.Table) -> np.ndarray:
        """Add a row group; returns the places of the rows that the view keeps. Raises UserError."""
        from pandas.util import hash_array

        keys = tables[SAMPLES]["key"]
        if not reasons["key"].equals(keys):
            raise UserError(f"view {self.view.name} is of other samples of {group.shard}. Make it again.")
        left_out = reasons["left_out"]
        rule_numbers = pc.struct_field(pc.extract_regex(left_out, r"^(?P<number>\d+) "), "number")
        codes = pc.fill_null(rule_numbers.cast(pa.int64()), 0).to_numpy()  # 0 where a row is kept
        null = pc.fill_null(pc.ends_with(left_out, ": null"), False).to_numpy()
        salt = hashlib.blake2b(f"{self._seed} {group.shard}".encode(), digest_size=8).hexdigest()
        order = hash_array(keys.to_numpy(), hash_key=salt, categorize=False).astype(np.float64)
        for rule in self.rules:
            rule.add(group, codes, null, order, self._values(rule, tables))
        return np.flatnonzero(codes == 0)

    def close(self) -> None:
        """End the process that computes expressions."""
        self._limited.__exit__()

    def _expression(self, data: Dataset, number: int, rule: Mapping[str, Any]) -> Expression | None:
        """The expression by which a rule keeps the largest values; None if it has none, or one that is not computed."""
        keep = rule.get("keep")
        if not keep or keep.get("within"):  # each group has its own threshold
            return None
        try:
            found = self._limited.check(str(keep["by"]), f"rules.{number - 1}.keep.by")
        except LimitError as error:
            self._report(number, error)
            return None
        except UserError:  # without duckdb, samples are shown without values
            return None
        return found if found.layers <= {*data.layers} else None

    def _values(self, rule: RuleSides, tables: Mapping[str, pa.Table]) -> np.ndarray:
        if rule.expression is not None:
            try:
                return self._limited.values(rule.expression, tables)
            except UserError as error:  # also one that fails on a sample
                self._report(rule.number, error)
                rule.expression = None
        return np.zeros(0)

    def _report(self, number: int, error: UserError) -> None:
        self.problems.append(f"view {self.view.name}, rule {number}: samples are shown without values: {error}")
