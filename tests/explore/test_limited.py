"""Expressions of somebody else's view take bounded time and memory, and what they give is as in a selection."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.store import Store
from reinforce.dataset.view import read_view, view_fingerprint, write_view
from reinforce.errors import UserError
from reinforce.explore import expressions as limited
from reinforce.explore.expressions import (
    Expression,
    LimitedExpressions,
    LimitError,
    check,
    connect,
    evaluate,
    join_rows,
    numbers,
)
from reinforce.explore.report import inspect
from tests.helpers.views import make_view

#: Expressions that need any memory or time.
MEMORY = ["length(repeat(key, 500000000))", "len(range(2000000000 + width))", "length(rpad(key, 2000000000, 'x'))"]
TIME = ["levenshtein(repeat(key, 30000), repeat(key, 30001)) + width"]

COLUMNS = (("key",), ("width",))


@pytest.fixture
def url(copy: Path) -> str:
    return str(copy)


def tables_of(url: str) -> dict[str, pa.Table]:
    return {SAMPLES: pq.read_table(sorted(Path(url, "samples").iterdir())[0])}


def manifest_of(url: str) -> Mapping[str, Any]:
    manifest: Mapping[str, Any] = json.loads(Path(url, "dataset.json").read_text())
    return manifest


def test_values_are_those_of_a_selection_and_wrong_expressions_are_errors_of_the_user(url: str) -> None:
    manifest, tables = manifest_of(url), tables_of(url)
    with LimitedExpressions(manifest) as expressions, connect() as database:
        for text in ("width / 7.0", "length(caption)", "CASE WHEN key LIKE '%1' THEN 1 END"):
            found = expressions.check(text, "rules.0.keep.by")
            rows = join_rows([check(text, manifest, "", "number")], tables)
            expected = numbers(evaluate(database, [text], rows)[0], text)
            np.testing.assert_array_equal(expressions.values(found, tables), expected)
        with pytest.raises(UserError, match=r"rules\.0\.keep\.by: there is no column uid"):
            expressions.check("uid", "rules.0.keep.by")
        failing = expressions.check("caption::INTEGER", "rules.0.keep.by")
        with pytest.raises(UserError, match="an expression fails on a sample"):
            expressions.values(failing, tables)
        assert len(expressions.values(expressions.check("height", ""), tables)) == len(tables[SAMPLES])


@pytest.mark.parametrize("text", [*MEMORY, *TIME])
def test_expressions_above_limits_fail_in_bounded_time(url: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited, "SECONDS", 2.0)
    with LimitedExpressions(manifest_of(url)) as expressions:
        begin = time.monotonic()
        with pytest.raises(UserError, match=r"needs more than|Out of Memory|[Mm]emory|[Aa]llocat"):
            expressions.values(Expression(text, COLUMNS), tables_of(url))
        assert time.monotonic() - begin < 60, "most of it starts the process"


def test_further_expressions_do_not_start_it_again_and_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited, "SECONDS", 2.0)
    with LimitedExpressions(manifest_of(url)) as expressions:
        found = Expression(TIME[0], COLUMNS)
        for message in ("needs more than 2 s", "other expressions of the view have reached the limits"):
            with pytest.raises(LimitError, match=message):
                expressions.values(found, tables_of(url))


def test_a_report_on_a_hostile_view_names_the_rule(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited, "SECONDS", 1.5)
    store = Store(url)
    make_view(url, {"keep": {"top": 0.5, "by": "width + key::INT"}})
    view = read_view(store, "some")
    rules = [{"keep": {"top": 0.5, "by": TIME[0]}}]
    fingerprint = view_fingerprint(rules, view.seed, view.inputs, view.counts, view.files)
    Path(url, "views/some", f"rows-{view.fingerprint}").rename(Path(url, "views/some", f"rows-{fingerprint}"))
    write_view(store, replace(view, rules=rules, fingerprint=fingerprint))
    begin = time.monotonic()
    found = inspect(url, str(tmp_path / "report"), view="some")
    assert time.monotonic() - begin < 30
    assert found.rows == len(view)
    page = (tmp_path / "report/index.html").read_text()
    assert "view some, rule 1: samples are shown without values" in page
    assert "Kept" in (tmp_path / "report/view.html").read_text()
