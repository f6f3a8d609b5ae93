"""Progress on a terminal, in a notebook and in a log; numbers for people."""

from __future__ import annotations

import io
import re
import sys
import types
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from reinforce import terminal
from reinforce.terminal import Screen, escape, format_bytes, format_duration, plural, print_table


class Notebook(types.ModuleType):
    """``IPython.display`` of a notebook: keeps the text of each output, and counts the updates."""

    def __init__(self) -> None:
        super().__init__("IPython.display")
        self.outputs: list[str] = []
        self.updates = 0

    def display(self, data: Any, raw: bool = False, display_id: bool = False) -> Any:
        assert raw
        assert display_id
        position = len(self.outputs)
        self.outputs.append(data["text/plain"])

        def update(data: Any, raw: bool = False) -> None:
            assert raw
            self.outputs[position] = data["text/plain"]
            self.updates += 1

        return types.SimpleNamespace(update=update)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Notebook:
    made = Notebook()
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", made)
    return made


def test_a_notebook_has_one_line_that_is_updated_in_place(
    notebook: Notebook, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "_NOTEBOOK_SECONDS", 0.0)
    with Screen(Console(force_jupyter=True)) as screen:
        for done in range(1, 101):
            screen.draw(f"{done} of 100 shards", done, 100)
        assert len(notebook.outputs) == 1
        assert notebook.outputs[0].endswith("100 of 100 shards")
        screen.draw("half of it", 50, 100)
        bar, _, line = notebook.outputs[0].partition(" half")
        assert (bar.rstrip(), line) == ("━" * 10, " of it")
        screen.advance(100)
        assert notebook.outputs == ["━" * 20 + " half of it"]
    assert notebook.outputs == [""]
    assert capsys.readouterr().out == ""


def test_a_notebook_is_updated_at_most_twice_a_second(notebook: Notebook) -> None:
    with Screen(Console(force_jupyter=True)) as screen:
        for done in range(1000):
            screen.draw("training", done, 1000)
            screen.advance(done)
        assert notebook.updates <= 2


def test_a_line_in_a_notebook_is_cut_to_one_line(notebook: Notebook) -> None:
    with Screen(Console(force_jupyter=True)) as screen:
        screen.draw("long\x1b[2J " * 100, 1, 2)
        assert "\n" not in notebook.outputs[0]
        assert "\x1b" not in notebook.outputs[0]
        assert len(notebook.outputs[0]) <= 115


def test_a_log_has_the_line_every_ten_seconds_without_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    out, now = io.StringIO(), 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    with Screen(Console(file=out)) as screen:
        for second in range(25):
            now = float(second)
            screen.draw(f"at {second} s", second, 25)
            screen.advance(second)
        screen.log("[bold]finished")
    assert out.getvalue() == "at 10 s\nat 20 s\n[bold]finished\n"


@given(st.text())
def test_escaped_text_has_no_control_characters(text: str) -> None:
    shown = escape(text + "\x1b[2J\x9b31m\u202egnp.exe\r")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", shown)
    assert "\\x1b[2J" in shown


def test_durations_are_formatted_like_a_clock_bytes_have_a_binary_unit_and_one_thing_is_singular() -> None:
    clocks = {0: "0:00:00", 65: "0:01:05", 3599.6: "1:00:00", 93_784: "1d 02:03:04"}
    assert {seconds: format_duration(seconds) for seconds in clocks} == clocks
    sizes = {0: "0 B", 1023: "1023 B", 1536: "1.5 KiB", 2**40: "1.0 TiB", 2**60: "1048576.0 TiB"}
    assert {count: format_bytes(count) for count in sizes} == sizes
    assert [plural(count, "shard") for count in (0, 1, 2000)] == ["0 shards", "1 shard", "2,000 shards"]


def test_a_table_that_is_piped_is_not_wrapped_or_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = Table(box=None)
    table.add_column("layer", no_wrap=True)
    table.add_column("content")
    table.add_row("embeddings/" + "x" * 100, "words " * 40)
    monkeypatch.delenv("COLUMNS", raising=False)
    print_table(table)
    assert [len(line) > 300 for line in capsys.readouterr().out.splitlines()] == [True, True]
    monkeypatch.setenv("COLUMNS", "60")
    print_table(table)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 60
