"""What the benchmark of a GPU finds on a machine, and what it says to install."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.gpu import machine
from benchmarks.gpu.machine import Check, check_machine

NO_HEADERS = "cat >/dev/null; echo 'fatal error: Python.h: No such file' >&2; exit 1"
DEV = f"python3.{sys.version_info[1]}-dev"


def card(driver: str = "580.65.06", used: int = 4) -> dict[str, str]:
    return {"nvidia-smi": f"echo 'NVIDIA H100 80GB HBM3, {driver}, 81559, {used}'"}


def found(folder: Path, *parts: str) -> dict[str, Check]:
    return {check.name: check for check in check_machine(folder, parts)}


@pytest.mark.parametrize(
    ("programs", "cuda", "name", "what", "fix"),
    [
        ({}, "None", "card", "nvidia-smi shows none", "containers with --gpus all"),
        (card(), "'13.0'", "card", "NVIDIA H100 80GB HBM3, 81559 MiB", ""),
        (card(used=40000), "'13.0'", "memory of the card in use", "40000 MiB", "another process"),
        (card(), "None", "torch", "torch 2.13.0 has no CUDA", "pip install --force-reinstall torch"),
        (card("570.86.15"), "'13.0'", "driver", "for CUDA 13.0 of torch 2.13.0", "it needs driver 580 or newer"),
        (card("580.65.06"), "'13.0'", "driver", "for CUDA 13.0 of torch 2.13.0", ""),
        (card("535.183.01"), "'12.6'", "driver", "for CUDA 12.6 of torch 2.13.0", ""),
        (card("[N/A]"), "'12.6'", "driver", "for CUDA 12.6 of torch 2.13.0", "it needs driver 525 or newer"),
        ({}, "None", "C compiler", "none", "apt-get install -y gcc libc6-dev"),
        ({"gcc": NO_HEADERS}, "None", "Python headers", "Python.h: No such file", DEV),
    ],
)
def test_what_a_machine_lacks_is_named_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: dict[str, str], cuda: str, name: str, what: str, fix: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    for program, script in programs.items():
        (tmp_path / program).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / program).chmod(0o755)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").touch()
    version = f"__version__ = '2.13.0'\ndebug = False\ncuda: Optional[str] = {cuda}\n"
    (tmp_path / "torch/version.py").write_text(version)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    check = found(tmp_path, "card", "compiler")[name]
    assert what in check.found
    assert (fix in check.fix, bool(check.fix)) == (True, bool(fix))
    assert str(check).startswith("ok" if not fix else "MISSING" if check.needed else "little")


def test_little_disk_and_shared_memory_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "DISK", 1e9)
    monkeypatch.setattr(machine, "SHARED", 1e9)
    checks = found(tmp_path / "of" / "later", "disk", "memory")
    assert "1000000000 GB are needed" in checks[f"disk with {tmp_path}"].fix
    assert "--shm-size=8g" in checks["shared memory"].fix
