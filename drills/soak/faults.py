"""Faults of a storage and killed processes, one at a time: ``python -m drills.soak.faults`` (a part of ``make soak``).

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

from drills.soak.bench import Bench
from drills.soak.cases import CASES, Case
from drills.soak.kills import KILLS, Kill, run_killed
from reinforce.errors import UserError
from tests.helpers.s3_proxy import s3_behind_proxy
from tests.helpers.s3_runs import layers

_LIMIT_SECONDS = 600  # of a case
_REFUSED = ("/quarantine/", "/set-aside/")


@dataclass(frozen=True)
class Outcome:
    """How a case ended: ``error`` is the first line of the run's error, '' if it was complete, and ``problem`` what is
    wrong, '' if nothing is."""

    seconds: float
    error: str
    problem: str


def attempt(bench: Bench, case: Case | Kill) -> Outcome:
    name = re.sub(r"\W+", "-", case.name)
    bench.put_source(name)
    begin = time.monotonic()
    error = _run_case(bench, case, name) if isinstance(case, Case) else run_killed(bench, case, name)
    seconds = time.monotonic() - begin
    problem = _problem(bench, name, error)
    if isinstance(case, Case) and (bool(case.error) != bool(error) or not re.search(case.error, error)):
        problem = f"expected {case.error or 'a complete run'!r}, and it ended with {error or 'a complete run'!r}"
    return Outcome(seconds, error, problem)


def _run_case(bench: Bench, case: Case, name: str) -> str:
    """Run with a fault -> the error."""
    with case.inject(bench, name):
        try:
            summary = bench.run(name, failures={"allowed_share": 1.0, **case.failures})
        except UserError as caught:
            return " ".join(str(caught).split())
    return summary.message if summary.status else ""


def _problem(bench: Bench, name: str, error: str) -> str:
    """What is wrong with a dataset, which the same command completes after an error."""
    refused = [path for path in bench.s3.find(f"bucket/{name}/out") if any(part in path for part in _REFUSED)]
    if refused:
        return f"quarantined or set aside: {refused[:3]}"
    if error:
        bench.run(name)
    made, whole = layers(bench.s3, f"{name}/out"), bench.whole
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
            return attempt(bench, case)
    except Exception as error:  # a traceback that a user would see
        return Outcome(time.monotonic() - begin, "", f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
