"""``make mutants``: change one line at a time in a copy of the tree; the tests that are named beside it must fail.

The lines are in ``tests/mutants.yaml``. A change that passes all its tests survives: behaviour that no test holds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
LIST = ROOT / "tests" / "mutants.yaml"
_FAILED = 1  # pytest's exit status where tests have failed; others are errors of the list
_SECONDS = 600  # of the tests of one change, which may hang by it: that counts as noticed


@dataclass(frozen=True)
class Mutant:
    """A line of a file, what it is changed to, and the tests of which one must fail."""

    what: str
    file: str
    line: str
    changed: str
    tests: list[str]

    def apply(self, root: Path) -> str:
        """Change the line in a tree -> the whole text before. Raises ValueError unless the line stands there once."""
        path = root / self.file
        before = path.read_text(encoding="utf-8")
        lines = before.split("\n")
        places = [number for number, line in enumerate(lines) if line.strip() == self.line]
        if len(places) != 1:
            raise ValueError(f"{self.file} has this line {len(places)} times, not once: {self.line}")
        [place] = places
        old = lines[place]
        lines[place] = old[: len(old) - len(old.lstrip())] + self.changed
        path.write_text("\n".join(lines), encoding="utf-8")
        return before


def read_mutants() -> list[Mutant]:
    return [Mutant(**entry) for entry in yaml.safe_load(LIST.read_text(encoding="utf-8"))]


def copy_tree(target: Path) -> None:
    """Copy what the repository has: files that git tracks, and new ones that it does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run_tests(root: Path, tests: list[str]) -> tuple[int, str]:
    """Run tests in a tree -> pytest's exit status, and the end of what it printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    # The working folder is first on the path of modules, so that the copy's packages are imported.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return _FAILED, f"no end after {_SECONDS} s"
    return done.returncode, done.stdout[-1500:]


def survivors(chosen: list[Mutant], jobs: int) -> Iterator[Mutant]:
    """The mutants that pass all their tests. Raises SystemExit if tests fail without a change, or are not collected."""
    trees, local = [], threading.local()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(jobs):
            trees.append(Path(folder) / str(number))
            copy_tree(trees[-1])
        free = iter(trees)

        def start() -> None:
            local.tree = next(free)

        def passes(mutant: Mutant) -> bool:
            begun = time.monotonic()
            before = mutant.apply(local.tree)
            status, output = run_tests(local.tree, mutant.tests)
            (local.tree / mutant.file).write_text(before, encoding="utf-8")
            if status not in (0, _FAILED):
                raise SystemExit(f"{mutant.what}: pytest ended with status {status}\n{output}")
            verdict = "SURVIVED" if status == 0 else "noticed"
            print(f"{verdict:8} in {time.monotonic() - begun:3.0f} s  {mutant.file}: {mutant.what}", flush=True)
            return status == 0

        def plain(test: str) -> tuple[int, str]:
            return run_tests(local.tree, [test])

        with ThreadPoolExecutor(jobs, initializer=start) as pool:
            every = sorted({test for mutant in chosen for test in mutant.tests})
            for test, (status, output) in zip(every, pool.map(plain, every), strict=True):
                if status != 0:
                    raise SystemExit(f"{test} fails without a change, so it can show nothing\n{output}")
            for mutant, survived in zip(chosen, pool.map(passes, chosen), strict=True):
                if survived:
                    yield mutant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="copies of the tree that are tested at the same time")
    parser.add_argument("--only", default="", help="only changes whose file or description contains this text")
    options = parser.parse_args()
    chosen = [one for one in read_mutants() if options.only in f"{one.file} {one.what}"]
    begun = time.monotonic()
    left = [*survivors(chosen, options.jobs)]
    print(f"{len(chosen) - len(left)} of {len(chosen)} changes were noticed, in {time.monotonic() - begun:.0f} s")
    for mutant in left:
        print(f"SURVIVED {mutant.file}: {mutant.what}\n    {mutant.line}\n    {mutant.changed}")
    sys.exit(1 if left else 0)


if __name__ == "__main__":
    main()
