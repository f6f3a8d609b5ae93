"""``python -m benchmarks.gpu.machine``: whether a machine has what the benchmark needs, and what to install.

It runs before anything is installed: it imports the standard library alone.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PARTS = ("card", "python", "compiler", "disk", "memory")
_GB = 1e9
DISK = 20.0  # GB for models, shards, datasets and compiled code
SHARED = 2.0  # GB; Docker's default is 0.064, with which Ray keeps its objects on the disk
CORES, MEMORY = 12, 48.0  # of one card: fewer decode fewer images a second than it could take
_OCCUPIED = 1.0  # GB of the card that others use
#: Major version of the driver that each CUDA needs at least, by NVIDIA's notes on compatibility.
_DRIVERS = {"11": 450, "12": 525, "13": 580}
_WHEEL = "13.0"  # CUDA of the wheel of torch 2.13 that PyPI has, where torch is not installed yet
_OLDER = "pip install torch torchvision --index-url https://download.pytorch.org/whl/cu126"


@dataclass(frozen=True)
class Check:
    """What was found, and what to do where that does not suffice; without what is ``needed`` nothing is measured."""

    name: str
    found: str
    fix: str = ""
    needed: bool = True

    def __str__(self) -> str:
        state = "ok" if not self.fix else "MISSING" if self.needed else "little"
        return f"{state:8}{self.name}: {self.found}" + f"; {self.fix}" * bool(self.fix)


def check_machine(folder: Path, parts: Sequence[str] = PARTS) -> list[Check]:
    """The checks of these parts, for a benchmark in ``folder``."""
    found = {
        "card": _check_card,
        "python": _check_python,
        "compiler": _check_compiler,
        "disk": lambda: iter([_check_disk(folder)]),
        "memory": _check_memory,
    }
    return [check for part in parts for check in found[part]()]


def _check_card() -> Iterator[Check]:
    fields = "name,driver_version,memory.total,memory.used"
    try:
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)  # noqa: S603
        name, driver, total, used = (word.strip() for word in done.stdout.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
        advice = "rent a machine with NVIDIA's driver, and start containers with --gpus all"
        yield Check("card", f"nvidia-smi shows none ({type(error).__name__})", advice)
        return
    yield Check("card", f"{name}, {total} MiB")
    busy = _number(used) * 2**20 / _GB > _OCCUPIED
    yield Check("memory of the card in use", f"{used} MiB", "another process uses the card: end it" * busy, False)
    cuda, source = _cuda_of_torch()
    if cuda is None:
        yield Check("torch", f"{source} has no CUDA", "install the wheel with it: pip install --force-reinstall torch")
        return
    least = _DRIVERS.get(cuda.partition(".")[0], max(_DRIVERS.values()))
    fix = f"it needs driver {least} or newer: install that, or a torch for an older CUDA: {_OLDER}"
    yield Check("driver", f"{driver}, for CUDA {cuda} of {source}", fix if _number(driver) < least else "")
    try:
        ctypes.CDLL("libcuda.so.1")
        yield Check("libcuda.so.1", "found")
    except OSError:
        yield Check("libcuda.so.1", "not found", "start containers with NVIDIA_DRIVER_CAPABILITIES=compute,utility")


def _cuda_of_torch() -> tuple[str | None, str]:
    """CUDA of the torch that is installed, None for a build without, or of the wheel that would be; and which."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return _WHEEL, "PyPI's torch, which is not installed yet"
    text = Path(found.origin).with_name("version.py").read_text(encoding="utf-8")
    values = dict(re.findall(r"^(__version__|cuda)\b[^=\n]*= '?([^'\n]*)", text, flags=re.MULTILINE))
    cuda = values.get("cuda", "None")
    return None if cuda == "None" else cuda, f"torch {values.get('__version__', '')}"


def _check_python() -> Iterator[Check]:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    old = sys.version_info < (3, 10)
    yield Check("Python", version, "3.10 or newer is needed: make first-hour PYTHON=python3.12" * old)
    has_pip = importlib.util.find_spec("ensurepip") is not None or sys.prefix != sys.base_prefix
    yield Check("venv", "found" if has_pip else "not found", f"apt-get install -y python{version}-venv" * (not has_pip))


def _check_compiler() -> Iterator[Check]:
    """A compiler and headers of Python and of C, with which Triton builds what starts its kernels."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang", "cc")), None)
    if compiler is None:
        yield Check("C compiler", "none: models run eagerly", "apt-get install -y gcc libc6-dev")
        return
    yield Check("C compiler", compiler)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    include = sysconfig.get_path("include")
    command = [compiler, "-fsyntax-only", "-x", "c", "-I", include, "-"]
    try:
        done = subprocess.run(command, input="#include <Python.h>\n", capture_output=True, text=True, check=False)  # noqa: S603
        error = "" if done.returncode == 0 else " ".join(done.stderr.split())[:200]
    except OSError as problem:
        error = str(problem)
    fix = f"apt-get install -y libc6-dev python{version}-dev, or use a Python that has its headers"
    yield Check("Python headers", error or f"in {include}", fix * bool(error))


def _check_disk(folder: Path) -> Check:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / _GB
    name = f"disk with {folder}"
    return Check(name, f"{free:.0f} GB free", f"{DISK:.0f} GB are needed: name a folder by --folder" * (free < DISK))


def _check_memory() -> Iterator[Check]:
    shm = Path("/dev/shm")  # noqa: S108
    shared = shutil.disk_usage(shm).total / _GB if shm.exists() else 0.0
    yield Check("shared memory", f"{shared:.1f} GB", "start containers with --shm-size=8g" * (shared < SHARED))
    cores = len(os.sched_getaffinity(0))
    yield Check("cores", f"{cores}", f"shards wait for decoding with fewer than {CORES}" * (cores < CORES), False)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GB
    yield Check("memory", f"{memory:.0f} GB", f"{MEMORY:.0f} GB are safe" * (memory < MEMORY), False)


def _number(text: str) -> float:
    """The leading number of a reading, 0 without one, such as of [N/A]."""
    found = re.match(r"\d+", text)
    return float(found[0]) if found else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.machine", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(), help="of the benchmark; default: the current one")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="check these alone")
    options = parser.parse_args()
    checks = check_machine(options.folder.resolve(), options.only)
    print("\n".join(map(str, checks)))
    if any(check.fix and check.needed for check in checks):
        raise SystemExit(2)


if __name__ == "__main__":
    main()
