"""Memory of a step of a training: by arithmetic for the configs of students, and that the arithmetic is right."""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from reinforce.student.config import StudentConfig, load_student_config
from teachers.device.accelerator import Accelerator
from tests.helpers.pages import ROOT
from tests.helpers.real_sizes import PeakMemory, fake_student
from tests.helpers.students import batch_for, built, student_folder

STUDENTS = [ROOT / "configs/mobileclip2-s0.yaml", *sorted(ROOT.glob("configs/recipes/*-*-datacompdr*.yaml"))]
STUDENTS += sorted(ROOT.glob("configs/recipes/mobileclip-*-dfndr*.yaml"))
SAMPLES = 256  # so many that gradients, which are counted among the activations, are few beside them
LOSS = 2.5e9  # of 65,536 pairs, most of it vectors of all ranks; see test_real_sizes.py


@functools.cache
def step_bytes(name: str, checkpointing: bool) -> tuple[int, float]:
    """Weights, gradients and two moments of a student in bf16, and activations of a sample with two texts."""
    mode = FakeTensorMode()
    student = fake_student(mode, name, checkpointing)
    size = student.image.height
    with mode:
        batch = {kind: torch.empty(SAMPLES, 77, dtype=torch.int64) for kind in ("caption", "synthetic")}
        batch |= {"image": torch.empty(SAMPLES, size, size, 3, dtype=torch.uint8)}
    with mode, PeakMemory() as peak:
        with Accelerator("cpu", "bf16").autocast():
            encoded = student(batch)
        torch.stack([feature.sum() for feature in encoded.features.values()]).sum().backward()
    return 4 * sum(parameter.nbytes for parameter in student.parameters()), peak.bytes / SAMPLES


def gigabytes(config: StudentConfig, parts: int) -> float:
    """GB of a rank in a step; in several parts, the loss is computed before the activations that are kept."""
    compute, rows = config.train.compute, config.train.batch // config.train.compute.ranks
    state, of_sample = step_bytes(config.student.model, compute.gradient_checkpointing)
    loss = LOSS * config.train.batch / 65536
    activations = of_sample * rows / parts
    return (state + (activations + loss if parts == 1 else max(activations, loss))) / 1e9


@pytest.mark.parametrize("path", STUDENTS, ids=lambda path: path.stem)
def test_a_step_of_a_shipped_config_fits_on_a_card_of_80_gb_and_takes_what_its_comment_states(path: Path) -> None:
    config = load_student_config(path)
    parts = config.train.compute.accumulate
    needed = gigabytes(config, 1 if parts == "auto" else parts)
    assert re.findall(r"about (\d+) GB in a step", path.read_text()) == [f"{needed:.0f}"]
    assert needed < 0.94 * 80, "a trial keeps 6 % free"


def test_the_recipe_of_s0_does_not_fit_in_one_part() -> None:
    config = load_student_config(STUDENTS[0])
    assert step_bytes("MobileCLIP2-S0", False)[1] / 1e9 == pytest.approx(0.123, abs=0.003), "in docs/students.md"
    assert gigabytes(config, 1) > 120


def test_memory_by_arithmetic_is_less_than_a_process_takes_by_what_its_operations_need(tmp_path: Path) -> None:
    """Convolutions on a CPU reorder their inputs, which takes a third of a small FastViT's memory."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux, which resets the peak of a process")
    student = built(student_folder(tmp_path, "mobileclip")).train()
    batch = batch_for(student, 256)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _of_process("VmRSS")
    with PeakMemory() as peak:
        encoded = student(batch)
        torch.stack([feature.sum() for feature in encoded.features.values()]).sum().backward()
    assert 1 < (_of_process("VmHWM") - before) / peak.bytes < 1.6


def _of_process(key: str) -> int:
    """Bytes that Linux states for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
