"""A Prometheus of Debian that scrapes the Ray of the session."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import ray

BINARY = shutil.which("prometheus")
REPORT_SECONDS = 2.0  # between two reports of Ray's processes, as conftest.py sets it


class Prometheus:
    """Answers queries over the time since it was started."""

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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    scrape = {"job_name": "ray", "static_configs": [{"targets": targets}]}
    folder.mkdir()
    (folder / "prometheus.yml").write_text(
        json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]})
    )
    command = [
        BINARY,
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]
    with subprocess.Popen(command) as process:
        try:
            prometheus = Prometheus(f"http://127.0.0.1:{port}")
            deadline = time.monotonic() + 600
            while not prometheus.is_ready():
                assert process.poll() is None, "prometheus ended"
                assert time.monotonic() < deadline, "prometheus does not start"
                time.sleep(0.1)
            yield prometheus
        finally:
            process.terminate()


def wait_for_reports(arrived: Callable[[], bool] = lambda: True) -> None:
    """Wait until what was recorded is scraped, twice, since rates need two values; ``arrived`` may need longer."""
    time.sleep(REPORT_SECONDS)
    deadline = time.monotonic() + 600
    while not arrived() and time.monotonic() < deadline:
        time.sleep(0.5)
    time.sleep(2.0)


def wait_until_unchanged(totals: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Wait until no totals of earlier runs arrive any more, for four reports -> the totals."""
    wait_for_reports()
    deadline = time.monotonic() + 600
    before, since = totals(), time.monotonic()
    while time.monotonic() - since < 4 * REPORT_SECONDS and time.monotonic() < deadline:
        time.sleep(0.5)
        if (now := totals()) != before:
            before, since = now, time.monotonic()
    return before
