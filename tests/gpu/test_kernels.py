"""Kernels that torch writes for default paths, assembled for cards without one; `make test-slow` prints their table."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.pages import ROOT

PATHS = (
    "blocks of ViT-L-14-quickgelu", "blocks of ViT-L-14", "steps of coca_ViT-L-14", "student ViT-B-16",
    "student MobileCLIP2-S0",
)  # fmt: skip
USED = ("registers", "spilled", "shared")
#: Bytes of shared memory that a block can have, by architecture.
SHARED = {80: 166_912, 90: 232_448}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton's assembler is not installed")
@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize("path", PATHS)
def test_the_kernels_of_a_path_are_assembled_and_keep_values_in_registers(path: str, arch: int, tmp_path: Path) -> None:
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "torch"), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.card_hooks", path, str(arch)],
        env={**os.environ, **caches, "TRITON_DEFAULT_FP_FUSION": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{path}, sm_{arch}\n| kernel | configuration | registers | bytes spilled | bytes of shared memory |")
    print("|---|---|---|---|---|")
    for row in rows:
        config = row.get("error") or " ".join(f"{key} {value}" for key, value in row["config"].items())
        print("|", row["kernel"], "|", config, "|", *(f"{row.get(key, '')} |" for key in USED))
    assert rows
    assert not [row for row in rows if "error" in row]
    assert max(row["registers"] for row in rows) <= 255
    assert all(row["shared"] <= SHARED[arch] for row in rows)
