"""Teachers and captioners of both libraries in one run: its layers, what it counts, and what Prometheus scrapes."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch

import reinforce
from reinforce.engine.record import SERIES, RunSummary, dashboard_text
from reinforce.images.policy import decode
from reinforce.source.config import Limits
from schemas.seeds import seed_for
from teachers.fast_paths.usage import Usage
from teachers.fit import fit
from teachers.pixels import to_pixels
from teachers.registry import load_model
from tests.helpers.commands import printed_by
from tests.helpers.data import config_of, events_of, free_port, members_of, write_tar
from tests.helpers.models import tiny_captioners
from tests.helpers.models.tiny_coca import coca_model
from tests.helpers.models.tiny_models import open_clip_model, transformers_siglip
from tests.helpers.specs import captioner_spec
from tests.helpers.waiting import wait_for

BINARY = shutil.which("prometheus")
REPORT_SECONDS = 2.0  # between two reports of Ray's processes, as conftest.py sets it


class Prometheus:
    """Debian's, which scrapes the Ray of the session. Answers queries over the time since it was started."""

    def __init__(self, address: str) -> None:
        self._address, self._start = address, time.time()

    def series(self, query: str) -> list[dict[str, Any]]:
        """The series of an expression: their labels (``metric``) and their ``values``, pairs of time and text."""
        window = {"query": query, "start": self._start, "end": time.time(), "step": 1}
        with urlopen(f"{self._address}/api/v1/query_range?{urlencode(window)}") as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return found

    def last(self, query: str) -> float:
        """The last value of an expression with one series."""
        [series] = self.series(query)
        return float(series["values"][-1][1])

    def is_ready(self) -> bool:
        with contextlib.suppress(URLError, ConnectionError), urlopen(f"{self._address}/-/ready") as answer:
            return bool(answer.status == 200)
        return False


@contextlib.contextmanager
def scraping(folder: Path) -> Iterator[Prometheus]:
    """Scrape the nodes of the session's Ray once a second."""
    assert BINARY is not None
    targets = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes() if node["Alive"]]
    port = free_port()
    scrape = {"job_name": "ray", "static_configs": [{"targets": targets}]}
    folder.mkdir()
    (folder / "prometheus.yml").write_text(
        json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]})
    )
    command = [BINARY, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
    with subprocess.Popen(command) as process:
        try:
            prometheus = Prometheus(f"http://127.0.0.1:{port}")
            wait_for(lambda: process.poll() is not None or prometheus.is_ready())
            assert process.poll() is None, "prometheus ended"
            yield prometheus
        finally:
            process.terminate()


def wait_for_reports(arrived: Callable[[], bool] = lambda: True) -> None:
    """Wait until what was recorded is scraped, twice, since rates need two values; ``arrived`` may need longer."""
    time.sleep(REPORT_SECONDS)
    wait_for(arrived)
    time.sleep(2.0)


def wait_until_unchanged(totals: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Wait until no totals of earlier runs arrive any more, for four reports -> the totals."""
    wait_for_reports()
    before, since = totals(), time.monotonic()
    while time.monotonic() - since < 4 * REPORT_SECONDS:
        time.sleep(0.5)
        if (now := totals()) != before:
            before, since = now, time.monotonic()
    return before


pytestmark = pytest.mark.usefixtures("ray_session")

SIZES = (3, 2, 2, 2)
KEYS = [f"{shard:03d}{number:05d}" for shard, size in enumerate(SIZES) for number in range(size)]


@dataclass(frozen=True)
class Finished:
    """A run, and what Prometheus has scraped of it, if there is one."""

    config: dict[str, Any]
    summary: RunSummary
    before: dict[str, float]  # totals of earlier runs of this process
    prometheus: Prometheus | None


@pytest.fixture(scope="module")
def finished(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """A run of 9 samples and 72 captions, whose only worker takes a second for each shard."""
    folder = tmp_path_factory.mktemp("two-libraries")
    for number, size in enumerate(SIZES):
        write_tar(folder / "source" / f"{number}.tar", members_of(number, size))
    blip = {"family": "transformers", "model": tiny_captioners.blip(folder / "blip"), "captions": 3, "max_length": 9}
    coca = {"model": coca_model(folder / "coca"), "captions": 2, "max_length": 12, "clean": {"characters": 20}}
    clean = {"first_sentence": True}
    stammerer = {"class": "tests.helpers.models:RepetitiveCaptioner", "captions": 3, "clean": clean}
    small = open_clip_model(folder / "small", image_size=32, width=32, embed_dim=16, seed=0)
    teachers = {
        "red": {"class": "tests.helpers.models:PathTeacher", "options": {"delay": 1.0}},
        "small": {"model": small, "codec": "float32"},
        "siglip": {"family": "transformers", "model": transformers_siglip(folder / "siglip")},
    }
    captioners = {"blip": blip, "coca": coca, "stammerer": stammerer}
    config = config_of(f"{folder}/source/*.tar", folder / "out", captioners=captioners, teachers=teachers)
    config |= {"augmentations": {"count": 2, "size": 32}, "workers": {"max": 1}}
    with contextlib.ExitStack() as stack:
        prometheus = stack.enter_context(scraping(folder / "prometheus")) if BINARY else None
        before = wait_until_unchanged(partial(_totals, prometheus)) if prometheus else {}
        summary = reinforce.run(config)
        if prometheus:
            wait_for_reports(lambda: _totals(prometheus)["samples"] == before["samples"] + 9)
        yield Finished(config, summary, before, prometheus)


def test_captioners_of_two_libraries_write_layers_of_one_dataset(finished: Finished) -> None:
    summary = finished.summary
    assert summary.status == 0
    assert summary.cleaned["coca"]["captions"] == 2 * 9
    assert summary.cleaned["coca"]["cut"] > 0
    assert "blip" not in summary.cleaned, "counted only with `clean`"

    captioner = load_model("blip", captioner_spec(**finished.config["captioners"]["blip"]), "cpu")
    rows = list(reinforce.open(finished.config["output"]))
    for sample in rows:
        pixels = to_pixels(torch.tensor(fit(decode(sample.image, Limits()), captioner.image)[None]), captioner.image)
        seeds = np.array([[seed_for(0, sample.key, "captions/blip", n) for n in range(3)]], np.uint64)
        assert [sample.captions["blip"]] == captioner.caption(pixels, seeds)
        short = sample.captions["coca"]
        assert len(short) == 2
        assert all(0 < len(text) <= 20 for text in short)


#: Series whose values are compared with what the run has written.
COUNTED = ("samples", "captions", "tokens", "read_bytes", "written_bytes")


def _totals(prometheus: Prometheus) -> dict[str, float]:
    return {name: prometheus.last(f"sum(ray_reinforce_{name}_total) or vector(0)") for name in COUNTED}


@pytest.mark.skipif(BINARY is None, reason="no prometheus on this machine: apt-get install prometheus")
def test_every_query_of_the_dashboard_returns_data_of_a_run_and_totals_are_those_of_its_files(
    finished: Finished,
) -> None:
    prometheus, summary = finished.prometheus, finished.summary
    panels = json.loads(dashboard_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    for query in queries:
        values = prometheus.series(query.replace("$SessionName", ".+").replace("$__rate_interval", "30s"))
        assert values, query
    grown = {name: total - finished.before[name] for name, total in _totals(prometheus).items()}
    out = Path(finished.config["output"])
    layers = [path for path in out.rglob("*.parquet") if path.relative_to(out).parts[0] not in ("index", "quarantine")]
    read = sum(len(data) for number, size in enumerate(SIZES) for _, data in members_of(number, size))
    tokens = sum(stage.get("tokens", 0) for stage in summary.stages.values())
    assert tokens > 45
    written = sum(path.stat().st_size for path in layers)
    expected = {"samples": 9, "captions": 72, "tokens": tokens, "read_bytes": read, "written_bytes": written}
    assert grown == expected
    stages = {series["metric"]["stage"] for series in prometheus.series("ray_reinforce_stage_seconds_total")}
    assert stages >= {"reading", "decoding", "writing", "waiting for the accelerator"}
    samples = prometheus.series('ray_reinforce_worker_samples_total{worker="0"}')
    assert any(float(value) >= 2 for series in samples for _, value in series["values"]), "the worker's own count"
    known = {f"ray_{name}" for name in SERIES}
    assert set(re.findall(r"ray_\w+", " ".join(queries))) == known, "the dashboard shows every series"
    scraped = {series["metric"]["__name__"] for series in prometheus.series('{__name__=~"ray_reinforce_.+"}')}
    assert scraped <= known, "every series is documented"


def test_calls_of_fast_paths_reach_the_summary_the_events_the_status_and_the_metrics(
    finished: Finished, capfd: pytest.CaptureFixture[str]
) -> None:
    summary, out = finished.summary, finished.config["output"]
    texts = 4 * len(SIZES) - 2  # true captions, and those of each captioner; two shards have none of one
    assert summary.fast_paths == (
        Usage("red", "held_weights", reason="outputs would change"),
        Usage("red", "compile", asked=True, used=len(SIZES), plain=texts),
    ), "without the calls of the self-test"
    notes = [
        "red: fast path `held_weights` fell back: outputs would change; `held_weights: true` makes that an error",
        f"red: fast path `compile: true` ran in 4 of {4 + texts} calls; TORCH_LOGS=+dynamo in the environment shows "
        "why, `compile: false` turns it off",
    ]
    assert [note for note in summary.notes if "fast path" in note] == notes
    assert all(note in summary.text(out) for note in notes)
    [started] = events_of(Path(out), "worker_started")
    assert [(one["path"], one["asked"], one["used"]) for one in started["fast_paths"]] == [
        ("held_weights", False, 0), ("compile", True, 0),
    ]  # fmt: skip
    calls = [event["fast_paths"].get("red/compile", {}) for event in events_of(Path(out), "shard")]
    assert [sum(call.get(way, 0) for call in calls) for way in ("used", "plain")] == [4, texts]
    printed = printed_by(capfd, "status", out, "-v")
    line = "held_weights (off: outputs would change); compile 4 fast, "
    assert f"fast paths of red: {line}{texts} plain calls" in printed
    if finished.prometheus:
        for name, count in (("fast", 4), ("plain", texts)):
            assert finished.prometheus.last(f'ray_reinforce_{name}_calls_total{{path="red/compile"}}') == count


def test_dropped_captions_are_not_stored_and_are_counted_in_summary_events_and_status(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    summary, out = finished.summary, Path(finished.config["output"])
    bad = [key for key in KEYS if seed_for(0, key, "captions/stammerer", 0) % 4 == 0]
    assert len(bad) == 5
    counts = {"captions": 27, "cut": 4, "repetitive": 4 + 3 * 5, "null_rows": 5}
    assert summary.cleaned["stammerer"] == counts
    assert summary.refused == {"no_text": 5 + 3 * 5}, "in the captions layer and in the layers of its embeddings"
    line = "captions by stammerer: 27 captions, 4 cut, 19 repetitive, 5 null rows"
    assert line in summary.text("x")

    for sample in reinforce.open(str(out)):
        vectors = sample.texts["red"]["stammerer"]
        if sample.key in bad:
            assert sample.captions["stammerer"] is None
            assert np.isnan(vectors).all()
        else:
            assert sample.captions["stammerer"] == ["good", "longer.", "good"]
            np.testing.assert_array_equal(vectors[0], vectors[2])
    files = sorted((out / "quarantine/captions/stammerer").glob("*.parquet"))
    refused = [row for path in files for row in pq.read_table(path).to_pylist()]
    assert [(row["key"], row["reason"]) for row in refused] == [(key, "no_text") for key in bad]
    cleaned = (Counter(event["cleaned"]["stammerer"]) for event in events_of(out, "shard"))
    assert sum(cleaned, Counter()) == counts
    assert line in printed_by(capsys, "status", str(out))
