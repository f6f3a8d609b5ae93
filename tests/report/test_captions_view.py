"""The captions report as a table and as files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import fsspec
from PIL import Image
from rich.console import Console

from reinforce.dataset.layers import TRUE_CAPTION
from reinforce.report.captions import captions_report
from reinforce.report.captions_view import captions_table, write_report
from tests.helpers.data import config_of
from tests.helpers.reinforced import reinforce_here

FILES = {"report.json", "lengths.png", "distinct.png", "similarity.png"}


def test_a_report_is_formatted_as_a_table_and_written_as_json_and_plots(dataset: str, tmp_path: Path) -> None:
    report = captions_report(dataset)
    for folder in (str(tmp_path / "report"), "memory://reports/captions"):
        paths = write_report(report, folder)
        assert {path.rpartition("/")[2] for path in paths} == FILES
        for path in paths:
            with fsspec.open(path, "rb") as file:
                if path.endswith(".png"):
                    assert min(Image.open(file).size) > 300
                else:
                    assert json.load(file) == report

    console = Console(width=90, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(captions_table(report))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert lines[0] == ["namer", "repetitive", "true", "captions"]
    values = {tuple(line[:-3]): line[-3:] for line in lines[1:]}
    assert values["captions",][0] == "34"
    assert values["duplicates", "in", "an", "image"][2] == "-"
    assert values["similarity,", "images-only"] == ["-"] * 3
    mean = report["similarity"]["red"]["namer"]["mean"]
    assert values["similarity,", "red"][0].startswith(f"{mean:.3f}±")


def test_a_report_on_rows_without_captions_is_drawn(shards: Callable[..., str], tmp_path: Path) -> None:
    silent = {"class": "tests.helpers.models:RepetitiveCaptioner", "captions": 3, "clean": {"characters": 1}}
    config = config_of(shards(3), tmp_path / "silent", captioners={"silent": silent})
    config["input"] = {"captions": ["json:nothing"]}
    report = captions_report(reinforce_here(config))
    assert report["texts"][TRUE_CAPTION]["null"] == 1
    assert report["similarity"]["red"][TRUE_CAPTION]["mean"] is None
    assert len(write_report(report, str(tmp_path / "report"))) == 4
    captions_table(report)
