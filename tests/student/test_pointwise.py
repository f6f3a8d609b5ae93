"""Strided 1 x 1 convolutions of few channels, whose gradients oneDNN computes wrongly in channels-last order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from reinforce.student.pointwise import avoid_faulty_convolutions
from tests.helpers.demo import ROOT
from tests.helpers.students import built, student_folder

# This runs in its own process, because the fault can end a process with a signal. It can also give wrong gradients.
_GRADIENTS = """
import torch
from reinforce.student.pointwise import avoid_faulty_convolutions

for channels, out, size in ((3, 64, 256), (3, 24, 96), (4, 8, 32), (5, 64, 256), (12, 32, 64)):
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(channels, out, 1, 2, bias=False)
    reference = torch.nn.Conv2d(channels, out, 1, 2, bias=False).double()
    reference.load_state_dict(convolution.state_dict())
    assert avoid_faulty_convolutions(convolution) == 1
    for _ in range(3):
        images = torch.randn(4, channels, size, size).contiguous(memory_format=torch.channels_last)
        features = convolution(images)
        assert features.is_contiguous(memory_format=torch.channels_last)
        seen = torch.randn_like(features)
        for module, given, gradient in ((convolution, features, seen), (reference, None, seen.double())):
            module.zero_grad()
            (module(images.double()) if given is None else given).backward(gradient)
        torch.testing.assert_close(convolution.weight.grad.double(), reference.weight.grad, rtol=1e-4, atol=1e-3)
"""


def test_gradients_are_those_of_double_precision() -> None:
    process = subprocess.run([sys.executable, "-c", _GRADIENTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (0, "")


def test_only_affected_convolutions_are_changed() -> None:
    affected = torch.nn.Conv2d(3, 8, 1, 2)
    others = [
        torch.nn.Conv2d(3, 8, 3, 2),
        torch.nn.Conv2d(3, 8, 1),
        torch.nn.Conv2d(16, 8, 1, 2),
        torch.nn.Conv2d(8, 8, 1, 2, groups=8),
    ]
    assert avoid_faulty_convolutions(torch.nn.Sequential(affected, *others)) == 1
    assert affected._forward_hooks
    assert not any(other._forward_hooks for other in others)


def test_mobileclips_stem_is_affected(tmp_path: Path) -> None:
    student = built(student_folder(tmp_path, "mobileclip"))
    changed = [name for name, module in student.named_modules() if module._forward_pre_hooks]
    assert changed == ["clip.visual.trunk.stem.0.conv_scale.conv"]
