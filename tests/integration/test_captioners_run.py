"""Captioners of both libraries in one run, with and without `clean`."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import reinforce
from reinforce.cli import main
from reinforce.config import Limits
from reinforce.engine.record.metrics import SERIES, dashboard_text
from reinforce.engine.record.summary import RunSummary
from reinforce.images.policy import decode
from reinforce.seeds import seed_for
from teachers.preprocessing.fit import fit
from teachers.preprocessing.pixels import to_pixels
from teachers.registry import captioner_spec, load_captioner
from tests.helpers import tiny_captioners
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.prometheus import BINARY, Prometheus, scraping, wait_for_reports
from tests.helpers.tiny_coca import coca_model

pytestmark = pytest.mark.usefixtures("ray_session")


@dataclass(frozen=True)
class Finished:
    """A run, and what Prometheus has scraped of it, if there is one."""

    blip: dict[str, Any]
    url: str
    summary: RunSummary
    before: dict[str, float]  # totals of earlier runs of this process
    prometheus: Prometheus | None


@pytest.fixture(scope="module")
def finished(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """A run of 9 samples and 45 captions, whose only worker takes a second for each shard."""
    folder = tmp_path_factory.mktemp("two-libraries")
    for number, size in enumerate((3, 2, 2, 2)):
        write_tar(folder / "source" / f"{number}.tar", members_of(number, size))
    blip = {"family": "transformers", "model": tiny_captioners.blip(folder / "blip"), "captions": 3, "max_length": 9}
    coca = {"model": coca_model(folder / "coca"), "captions": 2, "max_length": 12, "clean": {"characters": 20}}
    red = {"class": "tests.helpers.models:ColorTeacher", "options": {"delay": 1.0}}
    config = config_of(f"{folder}/source/*.tar", folder / "out", captioners={"blip": blip, "coca": coca})
    config |= {"teachers": {"red": red}, "workers": {"max": 1}}
    with contextlib.ExitStack() as stack:
        prometheus = stack.enter_context(scraping(folder / "prometheus")) if BINARY else None
        if prometheus:
            wait_for_reports()
        before = {name: _total(prometheus, name) for name in COUNTED} if prometheus else {}
        summary = reinforce.run(config)
        if prometheus:
            wait_for_reports(lambda: _total(prometheus, "samples") == before["samples"] + 9)
        yield Finished(blip, config["output"], summary, before, prometheus)


def test_captioners_of_two_libraries_write_layers_of_one_dataset(finished: Finished) -> None:
    summary = finished.summary
    assert summary.status == 0
    assert summary.cleaned["coca"]["captions"] == 2 * 9
    assert summary.cleaned["coca"]["cut"] > 0
    assert "blip" not in summary.cleaned, "counted only with `clean`"

    captioner = load_captioner("blip", captioner_spec(**finished.blip), "cpu")
    rows = list(reinforce.open(finished.url))
    assert len(rows) == 9
    for sample in rows:
        pixels = to_pixels(torch.tensor(fit(_rgb(sample.image), captioner.image)[None]), captioner.image)
        seeds = np.array([[seed_for(0, sample.key, "captions/blip", n) for n in range(3)]], np.uint64)
        assert [sample.captions["blip"]] == captioner.caption(pixels, seeds)
        short = sample.captions["coca"]
        assert short is not None
        assert len(short) == 2
        assert all(0 < len(text) <= 20 for text in short)
        assert sample.texts["red"]["blip"].shape == (3, 8)
        assert sample.texts["red"]["coca"].shape == (2, 8)


#: Series whose values are compared with what the run has written.
COUNTED = ("samples", "captions", "tokens", "read_bytes", "written_bytes")


def _total(prometheus: Prometheus, name: str) -> float:
    return prometheus.last(f"sum(ray_reinforce_{name}_total) or vector(0)")


@pytest.mark.skipif(BINARY is None, reason="no prometheus on this machine: apt-get install prometheus")
def test_every_query_of_the_dashboard_returns_data_of_a_run_and_totals_are_those_of_its_files(
    finished: Finished,
) -> None:
    prometheus, summary = finished.prometheus, finished.summary
    assert prometheus is not None
    panels = json.loads(dashboard_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    for query in queries:
        values = prometheus.series(query.replace("$SessionName", ".+").replace("$__rate_interval", "30s"))
        assert values, query
    grown = {name: _total(prometheus, name) - finished.before[name] for name in COUNTED}
    files = [path for path in Path(finished.url).rglob("*.parquet") if path.parts[-2] != "index"]
    read = sum(len(data) for number, size in enumerate((3, 2, 2, 2)) for _, data in members_of(number, size))
    tokens = sum(stage.get("tokens", 0) for stage in summary.stages.values())
    assert tokens > 45
    written = sum(path.stat().st_size for path in files)
    expected = {"samples": 9, "captions": 45, "tokens": tokens, "read_bytes": read, "written_bytes": written}
    assert grown == expected
    stages = {series["metric"]["stage"] for series in prometheus.series("ray_reinforce_stage_seconds_total")}
    assert stages >= {"reading", "decoding", "writing", "waiting for the accelerator"}
    samples = prometheus.series('ray_reinforce_worker_samples_total{worker="0"}')
    assert any(float(value) >= 2 for series in samples for _, value in series["values"]), "the worker's own count"
    known = {f"ray_{name}" for name in SERIES}
    assert set(re.findall(r"ray_\w+", " ".join(queries))) == known, "the dashboard shows every series"
    scraped = {series["metric"]["__name__"] for series in prometheus.series('{__name__=~"ray_reinforce_.+"}')}
    assert scraped <= known, "every series is documented"


def _rgb(encoded: bytes) -> Image.Image:
    return decode(encoded, Limits())


def test_dropped_captions_are_not_stored_and_are_counted_in_summary_events_and_status(
    shards: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captioner = {"class": "tests.helpers.models:RepetitiveCaptioner", "captions": 3, "clean": {"first_sentence": True}}
    config = config_of(shards(20), tmp_path / "out", captioners={"stammerer": captioner})
    summary = reinforce.run(config)
    keys = [f"{number:08d}" for number in range(20)]
    bad = [key for key in keys if seed_for(0, key, "captions/stammerer", 0) % 4 == 0]
    assert len(bad) == 5
    counts = {"captions": 60, "cut": 15, "repetitive": 15 + 3 * 5, "null_rows": 5}
    assert summary.cleaned == {"stammerer": counts}
    assert summary.refused == {"no_text": 5 + 2 * 5}, "in the captions layer and in both layers of its embeddings"
    line = "captions by stammerer: 60 captions, 15 cut, 30 repetitive, 5 null rows"
    assert line in summary.text("x")

    for sample in reinforce.open(str(tmp_path / "out")):
        vectors = sample.texts["red"]["stammerer"]
        if sample.key in bad:
            assert sample.captions["stammerer"] is None
            assert np.isnan(vectors).all()
        else:
            assert sample.captions["stammerer"] == ["good", "longer.", "good"]
            np.testing.assert_array_equal(vectors[0], vectors[2])
    [refused] = (tmp_path / "out" / "quarantine" / "captions" / "stammerer").glob("*.parquet")
    assert [(r["key"], r["reason"]) for r in pq.read_table(refused).to_pylist()] == [(key, "no_text") for key in bad]
    [event] = [e for e in _events(tmp_path / "out") if e["event"] == "shard"]
    assert event["cleaned"] == {"stammerer": counts}
    with pytest.raises(SystemExit):
        main(["status", str(tmp_path / "out")])
    assert line in capsys.readouterr().out


def _events(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for part in output.glob("runs/*/events-*.jsonl") for line in part.read_text().splitlines()]
