"""The import contracts of pyproject.toml hold, and each fails when it is broken on purpose."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAZY = "\ndef _broken() -> None:\n    from {module} import {name}\n"


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "from importlinter.cli import lint_imports_command as run; run(['--no-cache', '--no-logo'])"
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_contracts_hold() -> None:
    done = check(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("file", "code", "contract"),
    [
        (
            "teachers/preprocessing/pixels.py",
            LAZY.format(module="reinforce", name="errors"),
            "reinforce uses teachers and schemas",
        ),
        (
            "reinforce/source/captions.py",
            LAZY.format(module="reinforce.dataset", name="layers"),
            "imports point one way",
        ),
        ("reinforce/unplaced.py", "", "imports point one way"),
        ("reinforce/training/task.py", LAZY.format(module="reinforce.dataset", name="store"), "Training imports"),
        ("reinforce/student/task.py", LAZY.format(module="reinforce.engine", name="plan"), "What learns"),
        ("schemas/reasons.py", LAZY.format(module="schemas", name="layers"), "No circles"),
    ],
)
def test_a_broken_contract_is_reported(tmp_path: Path, file: str, code: str, contract: str) -> None:
    for name in ("reinforce", "teachers", "schemas", "jobs", "benchmarks", "reinforce_docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a") as broken:
        broken.write(code)
    if file.startswith("schemas/"):  # a circle needs both directions
        with (tmp_path / "schemas/layers.py").open("a") as other:
            other.write(LAZY.format(module="schemas", name="reasons"))
    done = check(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert contract in done.stdout
    assert "BROKEN" in next(line for line in done.stdout.splitlines() if contract in line), done.stdout
