"""The benchmark of the pipeline, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.pipeline import page
from benchmarks.pipeline.__main__ import SECTIONS, main, make_parser, measure
from benchmarks.pipeline.figures import QUICK, Bench


def test_a_small_run_measures_the_figures_of_its_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    parts = ["host"]  # the others take a minute
    main(["--quick", "--cores", "1", "--only", *parts, "--results", f"{tmp_path}/figures.json"])
    output = capsys.readouterr().out
    results = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    figures = {figure.name: figure for figure in page.read_figures(results)}
    expected: list[str] = []
    for count in (2, 10):
        expected += [
            f"{what}, {count} augmentations"
            for what in (
                "CPU per sample",
                "CPU per sample of its own process",
                "CPU per sample of its decode processes",
                "all CPU / that of decoding and augmenting alone",
                "host ceiling: 1 / CPU of its own process",
            )
        ]
    for name in expected:
        assert figures[name].value > 0, name
        assert name in output
    assert all(figure.value > 0 and figure.section for figure in figures.values())
    assert all(f"{name}: " in output for name in parts)
    assert results["quick"] is True
    assert page.render_page(page.PAGE.read_text(encoding="utf-8"), results)


@pytest.mark.parametrize(
    ("sections", "measured"), [(["memory"], ["memory"]), (["accelerator"], ["host", "accelerator"])]
)
def test_only_what_a_part_needs_is_measured(
    sections: list[str], measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    for function in ("measure_cpu", "measure_busy"):
        monkeypatch.setattr(f"benchmarks.pipeline.__main__.{function}", lambda *_: [])
    monkeypatch.setitem(SECTIONS, "memory", lambda _: [])
    measure(Bench(tmp_path, "stand-in", 1, QUICK, lines.append, photos=[]), sections)
    assert [line.partition(":")[0] for line in lines] == measured


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args(["--only", "hosts"])
    assert "invalid choice: 'hosts'" in capsys.readouterr().err
