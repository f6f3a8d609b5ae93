"""Which towers are compiled on a stand-in for a card."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from teachers.fast_paths.frozen import FrozenAttention
from teachers.fast_paths.usage import set_enabled, snapshot
from teachers.open_clip.teacher import OpenClipTeacher
from teachers.registry import load_model, teacher_spec
from teachers.runtime.accelerator import Accelerator
from tests.helpers.models.tiny_models import open_clip_model
from tests.helpers.stand_in_cuda import stand_in_cuda

pytestmark = pytest.mark.usefixtures("own_fast_paths")


@pytest.fixture(autouse=True)
def attention_of_cuda() -> Iterator[None]:
    """torch's fused attention module, which is off under autocast on CUDA, is off on the CPU, too."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def images(count: int, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def stored_in(model: torch.nn.Module, dtype: torch.dtype) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.dtype == dtype}


#: Config keys, and the fast paths of a teacher on CUDA with them.
PATHS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "default": ({}, {"held_weights", "fused_attention", "compile"}),
    "without held weights": ({"held_weights": False}, {"fused_attention", "compile"}),
    "without fused attention": ({"fused_attention": False}, {"held_weights", "compile"}),
    "not compiled": ({"compile": False}, {"held_weights", "fused_attention"}),
}


@pytest.mark.parametrize("switch", ["config", "environment", None])
@pytest.mark.parametrize(("keys", "expected"), PATHS.values(), ids=PATHS)
def test_each_fast_path_of_a_teacher_has_a_key_and_one_switch_turns_all_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switch: str | None, keys: dict[str, bool], expected: set[str]
) -> None:
    spec = teacher_spec(model=open_clip_model(tmp_path), precision="bf16", **keys)
    if switch == "environment":
        monkeypatch.setenv("REINFORCE_ACCELERATOR", "plain")
    set_enabled(switch != "config")
    with stand_in_cuda() as cuda:
        teacher: Any = load_model("vit", spec, "cuda")
        modules = {type(one) for one in teacher._model.modules()}
        found = {
            "held_weights": bool(stored_in(teacher._model, torch.bfloat16)),
            "fused_attention": torch.nn.MultiheadAttention not in modules,
            "compile": bool(cuda.compiled),
        }
    assert {path for path, used in found.items() if used} == (set() if switch else expected)
    assert (FrozenAttention in modules) == found["fused_attention"]
    if switch:
        assert snapshot() == ()


@pytest.mark.parametrize(("compile_", "blocks"), [(None, 2), (True, 2), (False, 0)])
def test_blocks_are_compiled_on_cuda_unless_the_config_says_no(
    tmp_path: Path, compile_: bool | None, blocks: int
) -> None:
    spec = teacher_spec(model=open_clip_model(tmp_path), precision="bf16", compile=compile_)
    with stand_in_cuda() as cuda:
        teacher = OpenClipTeacher(spec, Accelerator("cuda", "bf16"))
        assert [one["dynamic"] for one in cuda.compiled] == [False] * blocks
        seen: list[int] = []
        teacher._model.visual.conv1.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
        for rows in (1, 3, 33):
            teacher.encode_images(images(rows).to("cuda"))
    assert seen == ([32, 32, 64] if blocks else [1, 3, 33]), "few shapes"
