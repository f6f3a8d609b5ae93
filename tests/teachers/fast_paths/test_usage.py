"""The switch of fast paths, and the counts of their calls by model."""

from __future__ import annotations

import json
import logging
import pickle
from dataclasses import asdict

import pytest

from teachers.fast_paths import usage
from teachers.fast_paths.usage import (
    Usage,
    fast_path,
    growth,
    loading,
    parse,
    problem_lines,
    set_enabled,
    snapshot,
    total,
    usage_lines,
)

pytestmark = pytest.mark.usefixtures("own_fast_paths")


def test_fast_paths_are_off_where_the_process_or_the_environment_says_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usage.enabled()
    set_enabled(False)
    assert not usage.enabled()
    monkeypatch.setenv(usage.VARIABLE, "fast")
    assert not usage.enabled()
    set_enabled(True)
    assert usage.enabled()
    monkeypatch.setenv(usage.VARIABLE, "plain")
    assert not usage.enabled()
    monkeypatch.setenv(usage.VARIABLE, "Plain")
    with pytest.raises(ValueError, match=r"REINFORCE_ACCELERATOR is 'Plain' .* set it to plain or fast"):
        usage.enabled()


def test_calls_are_counted_by_the_model_that_was_loaded(caplog: pytest.LogCaptureFixture) -> None:
    with loading("vit"):
        compiled = fast_path("compile", asked=True)
        with loading("inner"):
            fast_path("compile").plain = 3
        held = fast_path("held_weights")
    fast_path("graphs")
    compiled.used += 1
    compiled.used += 4
    with caplog.at_level(logging.WARNING):
        held.fall_back("its outputs would change")
        held.fall_back("another reason")
    assert caplog.messages == [
        "vit runs without the fast path `held_weights`: its outputs would change",
        "vit runs without the fast path `held_weights`: another reason",
    ]
    found = snapshot()
    assert found == (
        Usage("vit", "compile", asked=True, used=5),
        Usage("inner", "compile", plain=3),
        Usage("vit", "held_weights", reason="its outputs would change"),
        Usage("", "graphs"),
    )
    assert pickle.loads(pickle.dumps(found)) == found
    set_enabled(True)
    assert snapshot() == ()


def test_what_was_counted_between_two_snapshots_leaves_out_paths_without_news() -> None:
    with loading("a.b"):
        compiled, held, graphs = (fast_path(name, asked=name == "graphs") for name in ("compile", "held", "graphs"))
    held.fall_back("first")
    compiled.used += 2
    before = snapshot()
    assert growth(before, before) == ()
    compiled.used += 3
    compiled.plain += 1
    held.fall_back("second")
    graphs.fall_back("no memory")
    assert growth(before, snapshot()) == (
        Usage("a.b", "compile", used=3, plain=1), Usage("a.b", "graphs", asked=True, reason="no memory"),
    )  # fmt: skip
    assert total([*before, *growth(before, snapshot())]) == snapshot()
    assert total([Usage("vit", "compile"), Usage("vit", "compile", asked=True)]) == (
        Usage("vit", "compile", asked=True),
    )


def test_lines_show_calls_by_model_and_problems_name_the_fix() -> None:
    usages = (
        Usage("vit", "held_weights"),
        Usage("vit", "compile", used=9_000, plain=3),
        Usage("coca", "graphs", used=1, plain=2),
        Usage("coca", "compile", asked=True, plain=12),
        Usage("coca", "fused_attention", used=7, reason="no memory"),
        Usage("", "other", asked=True),
    )
    assert usage_lines(usages) == [
        "fast paths of vit: held_weights; compile 9,000 fast, 3 plain calls",
        "fast paths of coca: graphs 1 fast, 2 plain calls; compile 0 fast, 12 plain calls; "
        "fused_attention 7 fast, 0 plain calls (off: no memory)",
        "fast paths of a model: other",
    ]
    assert problem_lines(usages) == [
        "coca: fast path `graphs` ran in 1 of 3 calls; `graphs: false` turns it off",
        "coca: fast path `compile: true` never ran in 12 calls; TORCH_LOGS=+dynamo in the environment shows why, "
        "`compile: false` turns it off",
        "coca: fast path `fused_attention` fell back (7 of 7 calls ran it): no memory; `fused_attention: true` makes "
        "that an error",
    ]
    records = [{**asdict(one), "of a later version": 1} for one in usages]
    assert parse(json.loads(json.dumps(records))) == usages
