"""Towers with weights in the precision or in fp8, and compiled blocks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.transformer import ResidualAttentionBlock
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from reinforce.config import parse_config
from reinforce.dataset.store import Store
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.worker.models import load_models
from reinforce.engine.worker.shard import ShardProcess
from reinforce.errors import UserError
from reinforce.student.config import Loss
from teachers.fast_paths import towers
from teachers.fast_paths.frozen import Float8Layers, Float8Linear, FrozenAttention, check_device
from teachers.fast_paths.recompilation import Compiler
from teachers.fast_paths.usage import loading, snapshot
from teachers.open_clip.teacher import OpenClipTeacher
from teachers.open_clip.text import keep_residual_in_float32
from teachers.pixels import to_pixels
from teachers.protocols import ImageSpec
from teachers.registry import describe_model, load_model, teacher_spec
from teachers.runtime.accelerator import Accelerator
from teachers.tokens import PROBE_TEXTS
from tests.helpers.compiled_graphs import captured_graphs
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.decoding import decode_pool
from tests.helpers.models.named_models import open_clip_named
from tests.helpers.models.tiny_models import FULL_LENGTH, TRIMMED, open_clip_model, transformers_dinov2
from tests.helpers.specs import captioner_spec
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


def embeddings(teacher: Any) -> list[torch.Tensor]:
    """More than what ``hold_in_precision`` compares."""
    return [teacher.encode_images(images(3, teacher.image.height)), teacher.encode_texts([*PROBE_TEXTS, "a red car"])]


def stored_in(model: torch.nn.Module, dtype: torch.dtype) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.dtype == dtype}


@pytest.mark.parametrize(("kind", "precision"), [("small", "fp16"), ("class-token", "bf16"), ("bidirectional", "bf16")])
def test_held_weights_give_the_bits_of_autocast_or_stay_in_float32(tmp_path: Path, kind: str, precision: Any) -> None:
    model = open_clip_model(tmp_path, **{**TRIMMED, **FULL_LENGTH}[kind])
    accelerator = Accelerator("cpu", precision)
    teacher = OpenClipTeacher(teacher_spec(model=model, precision=precision), accelerator)
    before, stays = embeddings(teacher), kind == "bidirectional"
    if not stays:  # else open_clip takes the data type of the residual stream from a matrix
        keep_residual_in_float32(teacher._model)
    outputs = partial(towers.probe_outputs, teacher, accelerator)
    assert towers.hold_in_precision(teacher._model, accelerator, outputs) != stays
    assert all(map(torch.equal, before, embeddings(teacher)))
    [usage] = snapshot()
    if stays:
        assert not stored_in(teacher._model, accelerator.dtype)
        assert (usage.path, usage.reason) == ("held_weights", "CLIP: ValueError: outputs would change")
        with pytest.raises(ValueError, match="`held_weights: true` does not work with CLIP: outputs would"):
            towers.hold_in_precision(teacher._model, accelerator, outputs, asked=True)
        assert not stored_in(teacher._model, accelerator.dtype)
        return
    assert usage.reason is None
    held = stored_in(teacher._model, accelerator.dtype)
    assert {name for name in held if "visual" in name} >= {"visual.conv1.weight"}
    assert any(name.endswith("attn.in_proj_weight") for name in held)
    assert any(name.endswith("mlp.c_fc.weight") for name in held)
    assert not [name for name in held if "ln_" in name or "embedding" in name]


def test_a_teacher_on_cuda_holds_its_weights_in_bf16_and_copies_nothing_for_attention(tmp_path: Path) -> None:
    spec = teacher_spec(model=open_clip_model(tmp_path), precision="bf16")
    cpu = Accelerator("cpu", "bf16")
    plain = OpenClipTeacher(spec, cpu)
    assert towers.fuse_attention(plain._model, cpu, lambda: towers.probe_outputs(plain, cpu))
    expected = embeddings(plain)
    with stand_in_cuda() as cuda:
        teacher = OpenClipTeacher(spec, Accelerator("cuda", "bf16"))
        assert stored_in(teacher._model, torch.bfloat16)
        pixels = images(3).to("cuda")
        with cuda.counted() as counts:
            found = [teacher.encode_images(pixels), teacher.encode_texts([*PROBE_TEXTS, "a red car"])]
        assert all(torch.equal(one, other.cpu()) for one, other in zip(expected, found, strict=True))
        casts = [name for name in counts.by_name if name == "_to_copy"]
        assert counts.by_name["_to_copy"] < len(stored_in(teacher._model, torch.bfloat16)), casts
        assert counts.by_name["clone"] == 1, "of pixels, not one for each attention"
        assert {name: counts.by_name[name] for name in ("bmm", "addmm")} == {"bmm": 0, "addmm": 16}, "with its bias"


@pytest.mark.parametrize("name", ["ViT-L-14-quickgelu", "ViT-SO400M-14-SigLIP2", "MobileCLIP2-S0"])
def test_attention_without_copies_gives_the_embeddings_of_torchs_up_to_rounding(tmp_path: Path, name: str) -> None:
    outputs: dict[str, list[torch.Tensor]] = {}
    model = open_clip_named(tmp_path, name)
    for precision in ("fp32", "bf16"):
        accelerator = Accelerator("cpu", precision)  # type: ignore[arg-type]
        teacher = OpenClipTeacher(teacher_spec(model=model, precision=precision), accelerator)
        outputs[precision] = embeddings(teacher)
        assert towers.fuse_attention(teacher._model, accelerator, partial(towers.probe_outputs, teacher, accelerator))
        assert not [one for one in teacher._model.modules() if isinstance(one, torch.nn.MultiheadAttention)]
        outputs[f"fused {precision}"] = embeddings(teacher)
    for side, exact in enumerate(outputs["fp32"]):
        torch.testing.assert_close(outputs["fused fp32"][side], exact, rtol=0, atol=1e-6)
        plain, fused = ((outputs[one][side] - exact).abs().max() for one in ("bf16", "fused bf16"))
        assert fused <= 1.5 * plain, "the precision rounds more than the path"


def test_attention_that_cannot_be_replaced_stays_torchs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    accelerator = Accelerator("cpu")
    teacher = OpenClipTeacher(teacher_spec(model=open_clip_model(tmp_path)), accelerator)
    attention = teacher._model.visual.transformer.resblocks[0].attn
    torch.nn.init.normal_(attention.in_proj_bias)
    before = embeddings(teacher)
    attention.bias_k = torch.nn.Parameter(torch.ones(1, 1, 32))  # keys that the fused module does not have
    attention.bias_v = torch.nn.Parameter(torch.ones(1, 1, 32))
    changed = embeddings(teacher)
    assert not torch.equal(before[0], changed[0])
    outputs = partial(towers.probe_outputs, teacher, accelerator)
    with loading("vit"):
        assert not towers.fuse_attention(teacher._model, accelerator, outputs)
    assert "vit runs without the fast path `fused_attention`: CLIP: ValueError: results change" in caplog.text
    with pytest.raises(ValueError, match="`fused_attention: true` does not work with CLIP: results change"):
        towers.fuse_attention(teacher._model, accelerator, outputs, asked=True)
    assert teacher._model.visual.transformer.resblocks[0].attn is attention
    assert all(map(torch.equal, changed, embeddings(teacher)))


def test_paths_that_are_asked_for_run_on_a_cpu_and_say_where_there_is_nothing_to_do(tmp_path: Path) -> None:
    keys = {"held_weights": True, "fused_attention": True}
    model = open_clip_model(tmp_path / "vit")
    teacher: Any = load_model("vit", teacher_spec(model=model, precision="bf16", **keys), "cpu")
    plain = load_model("plain", teacher_spec(model=model, precision="bf16"), "cpu")
    assert stored_in(teacher._model, torch.bfloat16)
    assert FrozenAttention in {type(one) for one in teacher._model.modules()}
    for one, other in zip(embeddings(plain), embeddings(teacher), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-2)
    dino = transformers_dinov2(tmp_path / "dino")
    load_model("dino", teacher_spec(family="transformers", model=dino, precision="fp32", **keys), "cpu")
    reasons = {(one.model, one.path): one.reason for one in snapshot() if one.reason}
    assert reasons == {
        ("dino", "held_weights"): "weights need no cast in fp32",
        ("dino", "fused_attention"): "Dinov2Model has no attention module of torch",
    }


def test_fp8_keeps_the_attention_that_it_needs() -> None:
    spec = teacher_spec(model="ViT-B-32", pretrained="openai", precision="fp8", compile=True)
    plain = spec.plain()
    assert (plain.compile, plain.held_weights, plain.precision) == (False, False, "fp8")
    with pytest.raises(ValidationError, match="`precision: fp8` needs attention without copies: remove"):
        teacher_spec(model="ViT-B-32", pretrained="openai", precision="fp8", fused_attention=False)


def test_preparing_pixels_copies_nothing_and_waits_for_nothing() -> None:
    spec = ImageSpec(16, (0.48, 0.45, 0.40), (0.26, 0.27, 0.28))
    crops = torch.randint(0, 256, (2, 24, 24, 3), dtype=torch.uint8)
    with stand_in_cuda() as cuda:
        there = crops.to("cuda")
        with cuda.counted() as counts:
            pixels = to_pixels(there, spec)
        assert (counts.copies, counts.synchronizations) == ([], 0), counts
        assert torch.equal(pixels.cpu(), to_pixels(crops, spec))


def test_growing_and_shrinking_batches_compile_one_graph_for_each_power_of_two_and_all_blocks(tmp_path: Path) -> None:
    accelerator, sizes = Accelerator("cpu", "bf16"), [8, 3, 32, 31, 1, 17, 5, 25, 2]
    teacher = OpenClipTeacher(teacher_spec(model=open_clip_model(tmp_path), precision="bf16"), accelerator)
    model: Any = teacher._model
    assert towers.fuse_attention(model, accelerator, lambda: [model.encode_image(images(1))])
    encode = towers.padded(model.encode_image)
    with accelerator.forward(), captured_graphs() as graphs:
        expected = [encode(images(size)) for size in sizes]
        assert towers.compile_blocks(model.visual, Compiler("tower", asked=False)) == 2
        outputs = [encode(images(size)) for size in sizes]
    assert len(graphs.captured) == 2, "8 and 32"
    assert [len(output) for output in outputs] == sizes
    assert all(map(torch.equal, expected, outputs))


def test_two_towers_with_six_batch_sizes_each_are_compiled_for_all_of_them() -> None:
    sizes = [8, 16, 32, 64, 128, 256]
    with captured_graphs() as graphs:
        for width in (16, 32):
            tower = torch.nn.Sequential(*[ResidualAttentionBlock(width, 2) for _ in range(2)])
            assert towers.compile_blocks(tower, Compiler("tower", asked=False)) == 2
            encode = towers.padded(tower)
            with torch.inference_mode():
                for size in sizes:
                    encode(torch.zeros(size, 3, width))
    assert len(graphs.captured) == 2 * len(sizes), "torch's own limit is 8 graphs for all blocks of a class"


def test_only_blocks_that_are_alike_are_compiled() -> None:
    def block(width: int) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.GELU())

    first, second = torch.nn.Sequential(block(4), block(4)), torch.nn.ModuleList([block(8), block(8), block(4)])
    tower = torch.nn.ModuleDict({"stem": torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1)), "a": first, "b": second})
    assert list(towers._alike(tower)) == [first[0], first[1], second[0], second[1]]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_product_in_fp8_is_near_the_exact_one_and_a_row_does_not_depend_on_others() -> None:
    layer, x = Float8Linear(normal(48, 32), normal(48)), normal(5, 7, 32)
    exact = torch.nn.functional.linear(x, normal(48, 32), normal(48))
    found = layer(x)
    assert (found.dtype, found.shape) == (torch.bfloat16, exact.shape)
    assert (found - exact).norm() < 0.05 * exact.norm(), "3 bits of mantissa on both sides"
    others = torch.cat([1000 * x[:1], x[1:2], torch.zeros(1, 7, 32)])
    assert torch.equal(layer(others)[1], found[1])
    assert torch.equal(layer(others)[2], normal(48).bfloat16().expand(7, 48)), "rows of zeros have no scale"


def test_layers_of_other_sides_stay_and_the_plain_ones_come_back_bit_for_bit() -> None:
    block = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.GELU(), torch.nn.Linear(48, 20)).bfloat16()
    x = normal(3, 32).bfloat16()
    before = block(x)
    layers = Float8Layers([block])
    assert [type(one) for one in block] == [Float8Linear, torch.nn.GELU, torch.nn.Linear]
    after = block(x)
    assert not torch.equal(before, after)
    with layers.plain():
        assert torch.equal(block(x), before)
    assert torch.equal(block(x), after)
    with pytest.raises(ValueError, match="its image tower has no linear layers for `precision: fp8`"):
        Float8Layers([torch.nn.Conv2d(3, 16, 1)])


def test_a_device_without_fp8_is_refused_before_a_run_with_the_fix(tmp_path: Path) -> None:
    spec = teacher_spec(model=open_clip_model(tmp_path), precision="fp8")
    with pytest.raises(ValueError, match=r"teacher vit: `precision: fp8` needs an NVIDIA GPU: set .* to bf16 or auto"):
        load_model("vit", spec, "cpu")
    with stand_in_cuda(), pytest.MonkeyPatch.context() as patch:
        check_device(torch.device("cuda", 0))
        patch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
        patch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
        with pytest.raises(ValueError, match=r"NVIDIA A100-SXM4-80GB has no fp8 \(compute capability 8\.0, and 8\.9"):
            check_device(torch.device("cuda", 0))


def test_fp8_is_part_of_the_identity_of_a_model_and_refused_where_nothing_compares_or_uses_it(tmp_path: Path) -> None:
    specs = [teacher_spec(model=open_clip_model(tmp_path), precision=one) for one in ("bf16", "fp8")]
    bf16, fp8 = (describe_model("a", spec).identity for spec in specs)
    assert fp8 == {**bf16, "precision": "fp8"}
    with pytest.raises(ValidationError, match="`precision: fp8` is for image towers of teachers"):
        captioner_spec(model="coca_ViT-L-14", precision="fp8")
    with pytest.raises(ValidationError, match="`precision: fp8` is for `reinforce run`"):
        Loss(teachers={"a": teacher_spec(model="ViT-B-32", precision="fp8")})
    with pytest.raises(ValueError, match="`precision` is not used with `class`"):
        describe_model("red", teacher_spec(**{"class": "tests.helpers.models:ColorTeacher", "precision": "fp8"}))


@pytest.mark.parametrize(("growth", "near"), [(1, True), (3, False)])
def test_fp8_is_used_only_where_real_crops_have_the_embeddings_of_bf16(tmp_path: Path, growth: int, near: bool) -> None:
    write_tar(tmp_path / "source" / "0.tar", members_of(0, 6))
    vit: dict[str, Any] = {"model": open_clip_model(tmp_path / "vit"), "precision": "fp8"}
    weights = load_file(file := tmp_path / "vit" / "open_clip_model.safetensors")
    blocks = {name for name in weights if name.startswith("visual.transformer") and name.endswith("weight")}
    save_file({name: one * growth if name in blocks else one for name, one in weights.items()}, file)
    config = parse_config(
        config_of(
            f"{tmp_path}/source/*.tar",
            tmp_path / "out",
            captioners={},
            teachers={"vit": vit},
            workers={"batch": 4, "max": 1, "gpus": 1},
        )
    )
    plan = make_plan(config)
    with stand_in_cuda():
        models = load_models(config, plan.layers.values())
        models.uncompared = {"vit"}

        def run() -> Any:
            return ShardProcess(
                plan.pending[0], config, plan.layers, Store(config.output), models, decode_pool(), 8
            ).run()

        if not near:
            with pytest.raises(UserError, match=r"teachers\.vit: .* of 4 crops in fp8 have cosines of at least 0\.6"):
                run()
            assert not [*(tmp_path / "out").rglob("*.parquet")], "nothing is written"
            return
        smaller, note = run().notes
        assert smaller.startswith("teachers.vit: crops of 24 x 24 pixels are enlarged")
        assert note.startswith("teachers.vit: the embeddings of 4 crops in fp8 have cosines of at least 0.999"), note
        assert models.loaded["teachers"]["vit"].encode_images_in_bf16 is None, "its weights are released"  # type: ignore[attr-defined]
        assert models.uncompared == set()
