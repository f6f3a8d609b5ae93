"""Towers with weights in the precision, and compiled blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.transformer import ResidualAttentionBlock
from torch._dynamo.testing import CompileCounter

from teachers import registry
from teachers.device import towers
from teachers.device.accelerator import Accelerator
from teachers.open_clip.teacher import OpenClipTeacher
from teachers.open_clip.text import keep_residual_in_float32
from teachers.preprocessing.pixels import to_pixels
from teachers.protocols import ImageSpec
from teachers.registry import teacher_spec
from teachers.tokens.trimming import PROBE_TEXTS
from tests.helpers.stand_in_cuda import stand_in_cuda
from tests.helpers.tiny_models import FULL_LENGTH, TRIMMED, open_clip_model


@pytest.fixture(autouse=True)
def attention_of_cuda() -> Iterator[None]:
    """torch's fused attention module, which is off under autocast on CUDA, is off on the CPU, too."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def images(count: int, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def embeddings(teacher: Any) -> list[torch.Tensor]:
    """More than what ``hold_in_precision`` compares."""
    return [teacher.encode_images(images(3, teacher.image.height)), teacher.encode_texts([*PROBE_TEXTS, "a red car"])]


def stored_in(model: torch.nn.Module, dtype: torch.dtype) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.dtype == dtype}


@pytest.mark.parametrize(("kind", "precision"), [("small", "fp16"), ("class-token", "bf16")])
def test_weights_that_are_held_in_the_precision_give_the_bits_of_autocast(
    tmp_path: Path, kind: str, precision: Any
) -> None:
    model = open_clip_model(tmp_path, **{**TRIMMED, **FULL_LENGTH}[kind])
    accelerator = Accelerator("cpu", precision)
    teacher = OpenClipTeacher(teacher_spec(model=model, precision=precision), accelerator)
    before = embeddings(teacher)
    keep_residual_in_float32(teacher._model)
    assert towers.hold_in_precision(teacher._model, accelerator, lambda: towers.probe_outputs(teacher, accelerator))
    assert all(map(torch.equal, before, embeddings(teacher)))
    held = stored_in(teacher._model, accelerator.dtype)
    assert {name for name in held if "visual" in name} >= {"visual.conv1.weight"}
    assert any(name.endswith("attn.in_proj_weight") for name in held)
    assert any(name.endswith("mlp.c_fc.weight") for name in held)
    assert not [name for name in held if "ln_" in name or "embedding" in name]


def test_weights_stay_in_float32_where_the_outputs_would_change(tmp_path: Path) -> None:
    accelerator = Accelerator("cpu", "bf16")
    spec = teacher_spec(model=open_clip_model(tmp_path, **FULL_LENGTH["bidirectional"]), precision="bf16")
    teacher = OpenClipTeacher(spec, accelerator)
    before = embeddings(teacher)  # open_clip takes the data type of the residual stream from a matrix
    assert not towers.hold_in_precision(teacher._model, accelerator, lambda: towers.probe_outputs(teacher, accelerator))
    assert not stored_in(teacher._model, torch.bfloat16)
    assert all(map(torch.equal, before, embeddings(teacher)))


def test_a_teacher_on_cuda_holds_its_weights_in_bf16_with_the_embeddings_of_before(tmp_path: Path) -> None:
    spec = teacher_spec(model=open_clip_model(tmp_path), precision="bf16")
    expected = embeddings(OpenClipTeacher(spec, Accelerator("cpu", "bf16")))
    with stand_in_cuda() as cuda:
        teacher = OpenClipTeacher(spec, Accelerator("cuda", "bf16"))
        assert stored_in(teacher._model, torch.bfloat16)
        pixels = images(3).to("cuda")
        with cuda.counted() as counts:
            found = [teacher.encode_images(pixels), teacher.encode_texts([*PROBE_TEXTS, "a red car"])]
        assert all(torch.equal(one, other.cpu()) for one, other in zip(expected, found, strict=True))
        casts = [name for name in counts.by_name if name == "_to_copy"]
        assert counts.by_name["_to_copy"] < len(stored_in(teacher._model, torch.bfloat16)), casts


def test_preparing_pixels_copies_nothing_and_waits_for_nothing() -> None:
    spec = ImageSpec(16, (0.48, 0.45, 0.40), (0.26, 0.27, 0.28))
    crops = torch.randint(0, 256, (2, 24, 24, 3), dtype=torch.uint8)
    with stand_in_cuda() as cuda:
        there = crops.to("cuda")
        with cuda.counted() as counts:
            pixels = to_pixels(there, spec)
        assert (counts.copies, counts.synchronizations) == ([], 0), counts.describe()
        assert torch.equal(pixels.cpu(), to_pixels(crops, spec))


def compiled(model: torch.nn.Module, sizes: Sequence[int]) -> tuple[CompileCounter, list[torch.Tensor]]:
    counter, outputs = CompileCounter(), []
    assert towers.compile_blocks(model.visual, backend=counter) == 2
    encode = towers.padded(model.encode_image)
    with Accelerator("cpu", "bf16").forward():
        outputs = [encode(images(size)) for size in sizes]
    return counter, outputs


def test_growing_and_shrinking_batches_compile_one_graph_for_each_power_of_two_and_all_blocks(tmp_path: Path) -> None:
    torch._dynamo.reset()
    teacher = OpenClipTeacher(
        teacher_spec(model=open_clip_model(tmp_path), precision="bf16"), Accelerator("cpu", "bf16")
    )
    model: Any = teacher._model
    sizes = [8, 3, 32, 31, 1, 17, 5, 25, 2]
    with Accelerator("cpu", "bf16").forward():
        expected = [towers.padded(model.encode_image)(images(size)) for size in sizes]
    counter, outputs = compiled(model, sizes)
    assert counter.frame_count == 2, "8 and 32"
    assert [len(output) for output in outputs] == sizes
    assert all(map(torch.equal, expected, outputs))
    torch._dynamo.reset()


def test_two_towers_with_six_batch_sizes_each_are_compiled_for_all_of_them() -> None:
    torch._dynamo.reset()
    counter, sizes = CompileCounter(), [8, 16, 32, 64, 128, 256]
    for width in (16, 32):
        tower = torch.nn.Sequential(*[ResidualAttentionBlock(width, 2) for _ in range(2)])
        assert towers.compile_blocks(tower, backend=counter) == 2
        encode = towers.padded(tower)
        with torch.inference_mode():
            for size in sizes:
                encode(torch.zeros(size, 3, width))
    assert counter.frame_count == 2 * len(sizes), "torch's own limit is 8 graphs for all blocks of a class"
    torch._dynamo.reset()


def test_padding_is_a_function_of_the_size_alone_and_real_rows_keep_their_values() -> None:
    seen: list[int] = []

    def encode(batch: torch.Tensor) -> torch.Tensor:
        seen.append(len(batch))
        return batch * 2

    for size in (1, 8, 9, 250, 256, 257):
        batch = torch.randn(size, 3)
        assert torch.equal(towers.padded(encode)(batch), batch * 2)
    assert seen == [8, 8, 16, 256, 256, 512]


def test_only_blocks_that_are_alike_are_compiled_and_a_custom_class_compiles_itself() -> None:
    def block(width: int) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.GELU())

    first, second = torch.nn.Sequential(block(4), block(4)), torch.nn.ModuleList([block(8), block(8), block(4)])
    tower = torch.nn.ModuleDict({"stem": torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1)), "a": first, "b": second})
    assert list(towers._alike(tower)) == [first[0], first[1], second[0], second[1]]
    spec = teacher_spec(**{"class": "tests.helpers.models:ColorTeacher", "compile": True})
    with pytest.raises(ValueError, match="`compile` is not used with `class`"):
        registry.describe_teacher("red", spec)
