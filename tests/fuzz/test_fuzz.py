from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from tests.fuzz.targets import GOOD, HEADERS, TARGETS, Mutation, shard
from tests.fuzz.watchdog import bounded

ROOT = Path(__file__).parents[2]
#: How long `make fuzz` tries new cases, and the file with the case that is running.
SECONDS, CASE = float(os.environ.get("FUZZ_SECONDS", "0")), Path(tempfile.gettempdir(), "reinforce-fuzz-case.txt")
EXAMPLES = {"shard": 30, "packed": 20, "members": 30, "image": 75, "text": 75, "published": 50}
EXAMPLES |= {"dataset": 15, "manifest": 15, "table": 10}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_no_sample_is_lost_and_nothing_hangs(name: str) -> None:
    target, strategies = TARGETS[name]

    @settings(max_examples=EXAMPLES[name], derandomize=not SECONDS, database=None)
    @given(**strategies)
    def run(**values: Any) -> None:
        if SECONDS:
            CASE.write_text(f"{name}: {values!r}\n")  # the only trace of a hang or a crash
        with bounded():
            target(**values)

    until = time.monotonic() + SECONDS / len(TARGETS)
    run()
    while time.monotonic() < until:
        run()


def test_a_sample_whose_header_is_copied_to_the_front_is_reported() -> None:
    """Found by fuzzing: the copy is read first, with the following bytes as its data."""
    for starts in HEADERS.values():
        for start, _ in starts:
            shard([Mutation(0, 0, GOOD[start : start + 1024])])


@pytest.mark.parametrize("hang", ["while True: pass", "import re; re.match('(a+)+$', 'a' * 99 + 'b')"])
def test_a_hang_ends_the_process_with_a_traceback(hang: str) -> None:
    code = f"from tests.fuzz import watchdog; watchdog.SECONDS = 0.5\nwith watchdog.bounded():\n  exec({hang!r})"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGPROF
    assert "most recent call first" in ended.stderr
