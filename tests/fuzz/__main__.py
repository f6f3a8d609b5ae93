"""``python -m tests.fuzz --seconds 600``: run all targets in turn, with new cases each time (``make fuzz``)."""

from __future__ import annotations

import argparse
import itertools
import secrets
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.targets import TARGETS
from tests.fuzz.watchdog import bounded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--target", choices=[*TARGETS], action="append", help="default: all of them")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--examples", type=int, default=200, help="cases of a target before the next target")
    last = Path(tempfile.gettempdir(), "reinforce-fuzz-case.txt")
    parser.add_argument("--last", type=Path, default=last, help=f"file for the case that is running ({last})")
    arguments = parser.parse_args()
    names = arguments.target or [*TARGETS]
    cases: Counter[str] = Counter()
    slowest: dict[str, float] = dict.fromkeys(names, 0.0)

    def watched(name: str, target: Callable[..., None]) -> Callable[..., None]:
        def case(**values: Any) -> None:
            arguments.last.write_text(f"{name}: {values!r}\n")  # the only trace of a hang or a crash
            begin = time.process_time()
            with bounded():
                target(**values)
            cases[name] += 1
            slowest[name] = max(slowest[name], time.process_time() - begin)

        return case

    start, turn = time.monotonic(), arguments.seed
    print(f"seed {turn}", flush=True)
    outcome = "stopped at an error"
    try:
        for name in itertools.cycle(names):
            if time.monotonic() - start > arguments.seconds:
                break
            target, strategies = TARGETS[name]
            run = settings(
                max_examples=arguments.examples,
                deadline=None,
                database=None,
                phases=(Phase.generate, Phase.shrink),
                suppress_health_check=[*HealthCheck],
            )(seed(turn)(given(**strategies)(watched(name, target))))
            run()
            turn += 1
        outcome = "no errors"
        arguments.last.unlink(missing_ok=True)
    finally:
        counts = ", ".join(f"{cases[name]:,} of {name} (slowest {slowest[name]:.1f} s)" for name in names)
        print(f"{sum(cases.values()):,} cases in {time.monotonic() - start:.0f} s: {counts}; {outcome}")


if __name__ == "__main__":
    main()
