"""Students that train with rounded weights: what is rounded, when, and that their exports are plain models."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from reinforce import settings
from reinforce.errors import UserError
from reinforce.processes.signals import Stopped, StopSignal
from reinforce.shipping.targets.base import reparameterize
from reinforce.storage import Storage
from reinforce.student.config import Student as StudentSpec
from reinforce.student.config import StudentConfig
from reinforce.student.layers import can_quantize, quantize, round_inputs, round_weights
from reinforce.student.model import StudentModel, build_student
from reinforce.student.train import build, student_job
from reinforce.training.checkpoints import CheckpointFolder
from teachers.runtime.accelerator import Accelerator
from tests.helpers.ranks import results_of_ranks
from tests.helpers.students import batch_for, built, student_config, student_folder, train_briefly
from tests.helpers.trainings import gradients_of, run, stopping

STEPS = 5


def trained(folder: Path, kind: str = "mobileclip", **options: Any) -> StudentModel:
    student = built(student_folder(folder, kind), **options)
    train_briefly(student)
    return student


def features(student: StudentModel) -> torch.Tensor:
    return torch.cat(list(student(batch_for(student)).features.values()))


def rounded_export(student: StudentModel) -> StudentModel:
    """The reparameterised student with rounded weights, as an export with int8 weights computes."""
    other = copy.deepcopy(student).eval()
    other.clip = reparameterize(other.clip)
    with torch.no_grad():
        for module in other.clip.modules():
            for name, channel in {"weight": 0, "in_proj_weight": 0, "text_projection": 1, "proj": 1}.items():
                weight = module._parameters.get(name)
                if weight is not None and weight.ndim > 1:
                    weight.copy_(round_weights(weight, channel))
    return other


@pytest.mark.parametrize("kind", ["vit", "mobileclip"])
def test_a_training_computes_with_the_rounded_weights_of_the_reparameterised_export(tmp_path: Path, kind: str) -> None:
    student = trained(tmp_path, kind)
    plain, export, names = features(student.eval()), rounded_export(student), list(student.state_dict())
    student.train().quantize("int8-weights")
    computed = features(student)
    torch.testing.assert_close(computed, features(export))
    assert (computed - plain).abs().max() > 1e-3
    assert torch.equal(features(student.eval()), plain), "evaluations and exports are not rounded"
    assert list(student.state_dict()) == names
    student.train()
    (features(student)[:4] @ features(student)[4:].T).logsumexp(1).sum().backward()
    missed = [name for name, weight in student.clip.named_parameters() if "logit" not in name and weight.grad is None]
    assert missed == []


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("kind", ["vit", "mobileclip"])
def test_a_frozen_tower_is_rounded_and_keeps_its_statistics(tmp_path: Path, kind: str, tower: str) -> None:
    learning = trained(tmp_path, kind)
    frozen = copy.deepcopy(learning)
    plain = features(frozen.eval())
    statistics = {name: value.clone() for name, value in frozen.named_buffers()}
    frozen.towers = frozenset(["image", "text"])
    frozen.freeze([tower])
    for student in (learning.train(), frozen.train()):
        student.quantize("int8-weights")
    computed = features(frozen)
    side = slice(0, 4) if tower == "image" else slice(4, None)
    assert (computed - plain)[side].abs().max() > 3e-5
    torch.testing.assert_close(computed, features(learning))
    torch.testing.assert_close(features(frozen.eval()), plain)  # evaluations and exports are not rounded
    torch.testing.assert_close(features(frozen.train()), computed)
    assert all(torch.equal(value, statistics[name]) for name, value in frozen.named_buffers())


def test_int8_rounds_inputs_too_and_gradient_checkpointing_gives_the_same_gradients(tmp_path: Path) -> None:
    start, gradients = trained(tmp_path).state_dict(), []
    for checkpointing in (False, True):
        student = built(f"local-dir:{tmp_path}", checkpointing=checkpointing)
        student.load_state_dict(start)
        weights_only = copy.deepcopy(student)
        weights_only.quantize("int8-weights")
        student.quantize("int8")
        found = features(student)
        assert 1e-5 < (found - features(weights_only)).abs().max() < 0.1
        found[:4].matmul(found[4:].T).exp().sum().backward()
        gradients.append([weight.grad for weight in student.clip.parameters() if weight.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_values_are_rounded_to_255_of_a_channel_and_256_of_a_row_that_include_zero_and_gradients_pass() -> None:
    values = (torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [100.0]])).relu()
    values = (values - 0.5).requires_grad_()
    for rounded, most in ((round_weights(values, 0), 255), (round_inputs(values, (1,)), 256)):
        for row, exact in zip(rounded.detach(), values.detach(), strict=True):
            steps = row.unique().diff()
            assert 100 < len(steps) < most
            torch.testing.assert_close(row.max(), exact.max(), rtol=5e-3, atol=0)
            assert (row - exact).abs().max() <= steps.max() / 2 * 1.001
        (gradient,) = torch.autograd.grad(rounded.sum(), values)
        assert torch.equal(gradient, torch.ones_like(values))
    zeros = torch.zeros(2, 3)
    assert torch.equal(round_weights(zeros, 0), zeros)
    assert torch.equal(round_inputs(zeros, (1,)), zeros)


@pytest.mark.parametrize("part", ["visual.trunk.stem.1", "text.transformer.resblocks.0"])
def test_a_compiled_part_is_compiled_once_more_when_it_begins_to_round(tmp_path: Path, part: str) -> None:
    module = built(student_folder(tmp_path, "mobileclip")).clip.get_submodule(part)
    shape = (2, 16, 16, 16) if "visual" in part else (2, 16, 32)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    counter = CompileCounterWithBackend("eager")
    module.compile(backend=counter)
    module(inputs)
    quantize(module, "int8")
    compiled = module(inputs)
    module(inputs)
    assert counter.frame_count == 2
    torch.testing.assert_close(compiled, module.forward(inputs))


def config_with(folder: Path, dataset: str, train: dict[str, Any] | None = None, **student: Any) -> StudentConfig:
    own = {"steps": STEPS, "batch": 4, "ema": 0.5, "optimizer": {"warmup": 1, "lr": 0.01}, **(train or {})}
    return student_config(folder, dataset, "mobileclip", student=student, train=own)


def train(config: StudentConfig, stop_at: int | None = None) -> dict[str, torch.Tensor]:
    """Train in this process, and return the tensors of the last checkpoint."""
    task, feed = build(config, Accelerator("cpu"))
    stop = StopSignal()
    run(student_job(config), feed if stop_at is None else stopping(feed, stop, stop_at), stop, task)
    checkpoints = CheckpointFolder(Storage(config.output), 1)
    return checkpoints.load(max(checkpoints.steps()))[1]


def test_a_training_that_resumes_where_it_rounds_has_equal_weights_and_exports_a_plain_student(
    tmp_path: Path, labelled: str, capsys: pytest.CaptureFixture[str]
) -> None:
    compute = {"compute": {"accumulate": 2}}
    keys = {"quantize": {"int8": 0.6}}
    whole = train(config_with(tmp_path / "whole", labelled, compute, **keys))
    line = "step 3 and later ones train with int8, and keep their batch statistics"
    assert capsys.readouterr().out.count(line) == 1
    interrupted = config_with(tmp_path / "resumed", labelled, compute, **keys)
    with pytest.raises(Stopped):
        train(interrupted, stop_at=4)
    resumed = train(interrupted)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    loaded = open_clip.create_model(f"local-dir:{tmp_path}/whole/out/student")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, whole[f"average/clip.{name}"])


def _gradients(rank: int, folder: Path) -> dict[str, torch.Tensor]:
    """Gradients and batch statistics of a wrapped student, whose ranks have other statistics before the first step."""
    student = built(f"local-dir:{folder}")
    train_briefly(student, steps=2 + rank)
    student.zero_grad()
    student.quantize("int8-weights")
    wrapped = torch.nn.parallel.DistributedDataParallel(student, find_unused_parameters=True)
    found = wrapped(batch_for(student)).features
    found["image"].matmul(found["caption"].T).exp().sum().backward()
    return gradients_of(student) | dict(student.named_buffers())


def test_ranks_round_with_the_same_batch_statistics(tmp_path: Path) -> None:
    student_folder(tmp_path / "model", "mobileclip")
    first, second = results_of_ranks(partial(_gradients, folder=tmp_path / "model"), 2, tmp_path)
    assert first.keys() == second.keys()
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []


def test_keys_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"quantize": "int4"}, r"student\.quantize\.int4: Input should be 'int8-weights' or 'int8', got 'int4'"),
        ({"quantize": {"int8": 0.0}}, r"student\.quantize\.int8: .* be greater than 0, got 0"),
        ({"quantize": {"int8": 1.5}}, "less than or equal to 1, got 1.5"),
        ({"quantize": {"int8": 0.5, "int8-weights": 0.5}}, "at most 1 item"),
    ]
    for student, message in refused:
        with pytest.raises(UserError, match=message):
            config_with(tmp_path, "unread", **student)
    config = config_with(tmp_path, "unread", quantize="int8").model_dump(mode="json", by_alias=True)
    config["evaluate"] = {"export": "best", "zero_shot": {"set": {"images": "a.tar", "classes": "a.txt"}}}
    with pytest.raises(UserError, match=r"may choose a step before .* set it to last, or the share .* to 1"):
        settings.parse(StudentConfig, config)
    config["student"]["quantize"] = {"int8": 1.0}
    assert settings.parse(StudentConfig, config).student.quantize == {"int8": 1.0}
    nothing = torch.nn.Sequential(torch.nn.LayerNorm(3), torch.nn.GELU())
    assert not can_quantize(nothing)
    assert quantize(nothing, "int8") == 0
    monkeypatch.setattr("reinforce.student.model.can_quantize", lambda _: False)
    spec = StudentSpec(model=student_folder(tmp_path), quantize="int8")
    with pytest.raises(UserError, match=r"student: .* no layer whose weights `quantize` could round: remove the key"):
        build_student(spec, seed=0)
