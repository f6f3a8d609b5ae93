"""Faults of a storage and killed processes, one at a time: ``python -m tests.soak.faults`` (a part of ``make soak``).

Each run must end complete, with the files of an undisturbed run, byte for byte, or with one clear error. Nothing may be
quarantined or set aside for the storage's fault, and the same command must complete the dataset afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reinforce
from reinforce.errors import UserError
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.local_ray import local_ray
from tests.helpers.s3_proxy import Proxy, s3_behind_proxy, s3_environment
from tests.helpers.s3_runs import layers
from tests.soak.cases import CASES, SHARDS, Case
from tests.soak.kills import KILLS, Kill, run_killed

_LIMIT_SECONDS = 600  # of a case
_REFUSED = ("/quarantine/", "/set-aside/")


@dataclass(frozen=True)
class Outcome:
    """How a case ended: ``error`` is the first line of the run's error, '' if it was complete, and ``problem`` what is
    wrong, '' if nothing is."""

    seconds: float
    error: str
    problem: str


class Bench:
    """An object store behind a proxy, and what an undisturbed run writes there."""

    def __init__(self, folder: Path, proxy: Proxy) -> None:
        self.folder, self.proxy = folder, proxy
        os.environ |= s3_environment(proxy.url)
        import s3fs

        self.s3 = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
        self.s3.mkdir("bucket")
        self.tars = [write_tar(folder / f"{n}.tar", members_of(n, 4)) for n in range(SHARDS)]
        self.put_source("whole")
        self.run("whole")
        self.whole = layers(self.s3, "whole/out")
        assert len(self.whole) == 3 * SHARDS + 1, sorted(self.whole)

    def put_source(self, name: str) -> None:
        for path in self.tars:
            self.s3.put_file(str(path), f"bucket/{name}/source/{path.name}")

    def config(self, name: str, **changes: Any) -> dict[str, Any]:
        """The config of a case: one teacher, three layers.

        Its source counts as that of the undisturbed run, since the names of shards depend on their URLs.
        """
        teacher = {"class": "tests.helpers.models:ColorTeacher", "options": {"size": 16, "dim": 8}}
        moved = {f"s3://bucket/{name}/source": "s3://bucket/whole/source"} if name != "whole" else {}
        changes = {"captioners": {}, "teachers": {"red": teacher}, "moved": moved, **changes}
        return config_of(f"s3://bucket/{name}/source/*.tar", f"s3://bucket/{name}/out", **changes)

    def run(self, name: str, **changes: Any) -> reinforce.RunSummary:
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        with local_ray():
            return reinforce.run(self.config(name, **changes))

    def attempt(self, case: Case | Kill) -> Outcome:
        name = re.sub(r"\W+", "-", case.name)
        self.put_source(name)
        begin = time.monotonic()
        error = self._run_case(case, name) if isinstance(case, Case) else run_killed(self, case, name)
        seconds = time.monotonic() - begin
        problem = self._problem(name, error)
        if isinstance(case, Case) and (bool(case.error) != bool(error) or not re.search(case.error, error)):
            problem = f"expected {case.error or 'a complete run'!r}, and it ended with {error or 'a complete run'!r}"
        return Outcome(seconds, error, problem)

    def _run_case(self, case: Case, name: str) -> str:
        """Run with a fault -> the error."""
        with case.inject(self, name):
            try:
                summary = self.run(name, failures={"allowed_share": 1.0, **case.failures})
            except UserError as caught:
                return " ".join(str(caught).split())
        return summary.message if summary.status else ""

    def _problem(self, name: str, error: str) -> str:
        """What is wrong with a dataset, which the same command completes after an error."""
        refused = [path for path in self.s3.find(f"bucket/{name}/out") if any(part in path for part in _REFUSED)]
        if refused:
            return f"quarantined or set aside: {refused[:3]}"
        if error:
            self.run(name)
        made, whole = layers(self.s3, f"{name}/out"), self.whole
        if made.keys() != whole.keys():
            return f"other files: {sorted(made.keys() ^ whole.keys())[:3]}"
        differing = [key for key in made if _content(key, made[key]) != _content(key, whole[key])]
        return f"other bytes: {differing[:3]}" if differing else ""


def _content(name: str, data: bytes) -> Any:
    """What is compared of a file: of dataset.json what it says of layers and models, since the source was moved."""
    return [json.loads(data)[key] for key in ("layers", "teachers")] if name == "dataset.json" else data


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not finished in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression: cases whose names it matches")
    pattern = parser.parse_args().only
    cases: list[Case | Kill] = [*CASES, *KILLS]
    chosen = [case for case in cases if re.search(pattern, case.name)]
    logging.basicConfig(filename=os.devnull)
    problems = 0
    temporary = tempfile.TemporaryDirectory(prefix="reinforce-faults-")
    with temporary as folder, s3_behind_proxy() as proxy, open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):  # the progress of runs
            bench = Bench(Path(folder), proxy)
        for number, case in enumerate(chosen, 1):
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                outcome = _tried(bench, case)
            ended = "killed" if outcome.error == "killed" else "error"
            result = "FAILED" if outcome.problem else f"{ended}, then equal" if outcome.error else "equal"
            print(f"{number:3} {case.name:<70} {result:<18} {outcome.seconds:6.1f} s", flush=True)
            for line in (outcome.problem, outcome.error[:200]):
                if line not in ("", "killed"):
                    print(f"      {line}", flush=True)
            problems += bool(outcome.problem)
    print(f"{len(chosen)} faults, {problems} problems")
    sys.stdout.flush()
    os._exit(min(problems, 1))  # threads of a case that did not end would keep the process


def _tried(bench: Bench, case: Case | Kill) -> Outcome:
    begin = time.monotonic()
    try:
        with time_limit(_LIMIT_SECONDS):
            return bench.attempt(case)
    except Exception as error:  # a traceback that a user would see
        return Outcome(time.monotonic() - begin, "", f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
