"""Image towers in fp8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from reinforce.config import parse_config
from reinforce.dataset.files.store import Store
from reinforce.engine.inference.models import load_models
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.worker.shard import ShardProcess
from reinforce.errors import UserError
from reinforce.student.config import Loss
from teachers.device.fp8 import Float8Layers, Float8Linear, check_device
from teachers.registry import captioner_spec, describe_teacher, load_teacher, teacher_spec
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.decoding import decode_pool
from tests.helpers.stand_in_cuda import stand_in_cuda
from tests.helpers.tiny_models import open_clip_model


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
        load_teacher("vit", spec, "cpu")
    with stand_in_cuda(), pytest.MonkeyPatch.context() as patch:
        check_device(torch.device("cuda", 0))
        patch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
        patch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
        with pytest.raises(ValueError, match=r"NVIDIA A100-SXM4-80GB has no fp8 \(compute capability 8\.0, and 8\.9"):
            check_device(torch.device("cuda", 0))


def test_fp8_is_part_of_the_identity_of_a_model_and_refused_where_nothing_compares_or_uses_it(tmp_path: Path) -> None:
    specs = [teacher_spec(model=open_clip_model(tmp_path), precision=one) for one in ("bf16", "fp8")]
    bf16, fp8 = (describe_teacher("a", spec).identity for spec in specs)
    assert fp8 == {**bf16, "precision": "fp8"}
    with pytest.raises(ValidationError, match="`precision: fp8` is for image towers of teachers"):
        captioner_spec(model="coca_ViT-L-14", precision="fp8")
    with pytest.raises(ValidationError, match="`precision: fp8` is for `reinforce run`"):
        Loss(targets="online", teachers={"a": teacher_spec(model="ViT-B-32", precision="fp8")})
    with pytest.raises(ValueError, match="`precision` is not used with `class`"):
        describe_teacher("red", teacher_spec(**{"class": "tests.helpers.models:ColorTeacher", "precision": "fp8"}))


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
        [note] = run().notes
        assert note.startswith("teachers.vit: the embeddings of 4 crops in fp8 have cosines of at least 0.999"), note
        assert models.teachers["vit"].encode_images_in_bf16 is None, "its weights are released"  # type: ignore[attr-defined]
        assert models.uncompared == set()
