"""Trainings on a stand-in for CUDA: no mixed devices, and bounds on what a device is asked."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from reinforce.captioning.finetune import CaptioningTask
from reinforce.errors import UserError
from reinforce.processes.signals import Stopped, StopSignal
from reinforce.training import gather
from reinforce.training.batch_norms import _Shared, synchronize_batch_norms
from reinforce.training.checkpoints import State
from reinforce.training.ranks import Ranks
from reinforce.training.step import Prefetcher, backpropagate
from reinforce.training.trials import Trials
from teachers.runtime.accelerator import Accelerator
from tests.helpers.captioning import TEXTS, make_batch, make_captioner
from tests.helpers.real_sizes import RAISING
from tests.helpers.stand_in_cuda import StandIn, stand_in_cuda
from tests.helpers.students import batch_for, built, student_folder
from tests.helpers.trainings import PairFeed, TowersTask, curve, job, run, stopping

WIDE = 20_000  # middle features of a student whose activations are larger than its weights


def test_a_step_of_a_captioner_on_a_gpu_has_the_losses_of_a_cpu_and_deterministic_operations(tmp_path: Path) -> None:
    losses: list[dict[str, float]] = []
    for device in ("cpu", "cuda"):
        with stand_in_cuda() if device == "cuda" else contextlib.nullcontext(StandIn(0)) as cuda:
            accelerator = Accelerator(device)
            model = accelerator.place(make_captioner(tmp_path))
            task = CaptioningTask(model, model.loss, evaluator=None)  # type: ignore[arg-type]
            batches = Prefetcher([make_batch(TEXTS)], accelerator)
            batches.fetch()
            there = batches.take()
            with cuda.counted() as counts:
                output = backpropagate(task, model, there, len(TEXTS), [0], accelerator)
            losses.append({name: float(loss) for name, loss in output.losses.items()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert counts.synchronizations == 0, counts
    assert {"nll_loss_forward", "nll_loss_backward"} <= counts.by_name.keys()
    assert not RAISING & counts.by_name.keys(), "strict determinism ends the training"


@pytest.mark.usefixtures("no_pictures")
def test_a_training_on_a_gpu_that_resumes_has_the_weights_of_one_that_does_not(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"steps": 6, "ema": 0.9, "compute": {"accumulate": 2}}
    stop = StopSignal()
    with stand_in_cuda():
        accelerator = Accelerator("cuda")
        for name, feed, stopped in (
            ("whole", PairFeed(), StopSignal()),
            ("parts", stopping(PairFeed(), stop, 3), stop),
            ("parts", PairFeed(), StopSignal()),
        ):
            with contextlib.suppress(Stopped):
                run(job(tmp_path / name, **changes), feed, stopped, accelerator=accelerator, dropout=0.2)
    assert feed.seen[0] == 3
    whole, parts = (
        load_file(sorted((tmp_path / name / "checkpoints").glob("*.safetensors"))[-1]) for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


@pytest.mark.usefixtures("no_pictures")
def test_a_step_is_divided_as_far_as_memory_asks_and_a_resumed_training_keeps_the_division_while_it_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In fifths of a MB, 16 samples at once take 47, 8 take 40, 4 take 34; 6 % of the memory are kept free."""

    def train(output: str, memory: int, stop_at: int | None = None, **compute: Any) -> str:
        stop, changes = StopSignal(), {"steps": 4, "compute": compute}
        feed = PairFeed() if stop_at is None else stopping(PairFeed(), stop, stop_at)
        with stand_in_cuda(memory * 200_000), contextlib.suppress(Stopped):
            accelerator = Accelerator("cuda")
            run(job(tmp_path / output, **changes), feed, stop, accelerator=accelerator, width=WIDE, dropout=0.5)
        return " ".join(capsys.readouterr().out.split())

    assert "a rank's 16 samples of a step fit in one microbatch" in train("large", 100)
    shown = train("auto", 45)
    assert "a rank's 16 samples of a step fit in 2 microbatches of 8" in shown
    assert "1 of 2 microbatches pass the model once: their activations are kept" in shown
    assert "pass the model once" not in train("stated", 100, accumulate=2, keep_activations=False)
    for memory, kept in ((34, 0), (36, 2), (42, 3), (46, 4)):
        shown = train(f"kept in {memory}", memory, accumulate=4)
        assert (f"{kept} of 4 microbatches pass" in shown) if kept else ("pass the model once" not in shown)
        np.testing.assert_allclose(curve(tmp_path / f"kept in {memory}"), curve(tmp_path / "kept in 34"), rtol=1e-6)
    assert curve(tmp_path / "auto") == curve(tmp_path / "stated") != curve(tmp_path / "large")
    train("resumed", 45, stop_at=2)
    assert "last checkpoint" not in train("resumed", 100)
    assert curve(tmp_path / "resumed") == curve(tmp_path / "stated"), "on a larger card, too"
    train("smaller", 45, stop_at=2)
    assert "1 rank x 4 parts now and was divided into 1 rank x 2 parts at the last" in train("smaller", 36)
    with pytest.raises(UserError, match=r"out of memory: .* even one sample at a time. Lower train.batch, use more"):
        train("none", 20)
    with pytest.raises(
        UserError, match=r"out of memory in a training run: CUDA out of .* Increase train.compute.accumulate"
    ):
        train("too-few", 36, accumulate=1)
    with pytest.raises(UserError, match=r"Increase .*accumulate, or set train.compute.keep_activations to auto, or"):
        train("forced", 40, accumulate=4, keep_activations=True)


@pytest.mark.usefixtures("no_pictures")
def test_fewer_activations_are_kept_once_a_model_is_larger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with stand_in_cuda(46 * 200_000) as cuda:

        class Changing(TowersTask):
            def begin_step(self, step: int, steps: int) -> str | None:
                cuda.memory = cuda.memory if step < 2 else 38 * 200_000
                return "rounds from now on" if step == 2 else None

        task = Changing(width=WIDE, dropout=0.5)
        run(job(tmp_path, steps=4, compute={"accumulate": 4}), task=task, accelerator=Accelerator("cuda"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "4 of 4 microbatches pass the model once" in shown.partition("rounds from now on")[0]
    assert "2 of 4 microbatches pass the model once" in shown.partition("rounds from now on")[2]


def test_ranks_divide_alike_and_wait_for_none_in_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three ranks, another is out of memory with one part and with two."""
    monkeypatch.setattr(gather, "world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)

    class Others(Ranks):
        answers = [1, 1, 0]  # noqa: RUF012

        def start_max(self, value: int) -> Any:
            assert not value, "it fits here"
            return lambda: self.answers.pop(0)

    with stand_in_cuda():
        accelerator, task = Accelerator("cuda"), TowersTask(norm=True)
        task.model = accelerator.place(task.model)
        state = State(task.model, torch.optim.AdamW(task.model.parameters()))
        before = {name: value.clone() for name, value in state.tensors().items()}
        batch = next(iter(PairFeed().batches(0, 1, 12, 0)))
        there = Prefetcher([batch], accelerator)
        there.fetch()
        trials = Trials(task, state, there.peek(), 12, Others(1, 3, accelerator))
        assert trials.fewest_microbatches(None) == 4
        assert state.tensors().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in state.tensors().items())
        assert all(parameter.grad is None for parameter in task.model.parameters())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shared_batch_statistics_keep_weights_and_activations(tmp_path: Path, device: str) -> None:
    student = built(student_folder(tmp_path, "mobileclip"))
    one, two = Ranks(0, 1, Accelerator("cpu")), Ranks(0, 2, Accelerator("cpu"))
    with torch.no_grad():
        expected = copy.deepcopy(student)(batch_for(student)).features["image"]
    synchronize_batch_norms(student, one)
    layer = torch.nn.SyncBatchNorm if device == "cuda" else _Shared
    assert not any(isinstance(module, layer) for module in student.modules())
    parameters = [id(parameter) for parameter in student.parameters()]
    with stand_in_cuda():
        synchronize_batch_norms(student, replace(two, accelerator=Accelerator(device)))
    norms = [module for module in student.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(module, layer) for module in norms)
    assert [id(parameter) for parameter in student.parameters()] == parameters
    with torch.no_grad():  # without a process group, of the samples of this rank
        torch.testing.assert_close(student(batch_for(student)).features["image"], expected)
    if device == "cuda":
        with gather.without_communication():
            one = norms[0](torch.ones(1, norms[0].num_features, 1, 1))
        assert one.isfinite().all(), "one value a channel, as in a trial of parts of one sample"
