"""A shard and a training on a stand-in for CUDA: no mixed devices, and bounds on what a device is asked."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from reinforce.captioning.finetune import CaptioningTask
from reinforce.config import parse_config
from reinforce.dataset.store import Store
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.worker.actor import find_batch
from reinforce.engine.worker.models import load_models
from reinforce.engine.worker.shard import ShardProcess, allocate_pixels
from reinforce.errors import UserError
from reinforce.processes.signals import Stopped, StopSignal
from reinforce.student.train import train
from reinforce.training import gather, loop
from reinforce.training.batch_norms import _Shared, synchronize_batch_norms
from reinforce.training.checkpoints import State
from reinforce.training.ranks import Ranks
from reinforce.training.step import Prefetcher, StepOutput, backpropagate
from reinforce.training.trials import Trials
from teachers.fast_paths.usage import set_enabled, snapshot
from teachers.runtime.accelerator import Accelerator
from tests.helpers.captioning import TEXTS, make_batch, make_captioner
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.decoding import decode_pool
from tests.helpers.models.tiny_coca import coca_model
from tests.helpers.models.tiny_models import open_clip_model, transformers_siglip
from tests.helpers.real_sizes import RAISING
from tests.helpers.reinforced import reinforce_here, small_dataset
from tests.helpers.stand_in_cuda import Counts, StandIn, stand_in_cuda
from tests.helpers.students import batch_for, built, student_folder
from tests.helpers.trainings import PairFeed, TowersTask, curve, job, run, stopping

# For each batch of images with its texts, without decoding: one for the output of each model.
WAITS_A_BATCH = 6
# Reads the norm of the gradient.
WAITS_A_STEP = 1
WIDE = 20_000  # middle features of a student whose activations are larger than its weights


def test_a_shard_on_a_gpu_is_that_of_a_cpu_and_waits_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "source" / "0.tar", members_of(0, 12))

    def config(output: str, gpus: int) -> dict[str, Any]:
        return config_of(
            f"{tmp_path}/source/*.tar",
            tmp_path / output,
            captioners={
                "coca": {"model": coca_model(tmp_path / "coca"), "captions": 2, "max_length": 8, "precision": "fp32"}
            },
            teachers={
                "vit": {"model": open_clip_model(tmp_path / "vit"), "precision": "fp32"},
                "siglip": {
                    "model": transformers_siglip(tmp_path / "siglip"),
                    "family": "transformers",
                    "precision": "fp32",
                },
            },
            workers={"batch": 8, "max": 1, "gpus": gpus},  # three batches
        )

    here = reinforce_here(config("cpu", 0))
    parsed, pool = parse_config(config("cuda", 1)), decode_pool()
    plan = make_plan(parsed)
    monkeypatch.setattr(pool, "_regions", [])  # those of other tests are not pinned
    with stand_in_cuda() as cuda:
        models = load_models(parsed, plan.layers.values())
        find_batch(models, parsed, [plan.layers["captions/coca"]])
        assert models.captioners["coca"]._decoder.capacity == 1024, "of a large row group, to test its memory"
        allocate_pixels(pool, parsed, plan.layers.values(), models, 1)
        with cuda.counted() as counts:
            ShardProcess(plan.pending[0], parsed, plan.layers, Store(parsed.output), models, pool, 8).run()
    images = [copy for copy in counts.copies_to_device() if copy.place.startswith("teachers/runtime/accelerator.py")]
    assert images
    assert not any(copy.blocking for copy in images), images
    decoding = ("teachers/coca/", "teachers/decoding/", "teachers/fast_paths/recompilation.py")  # which captures once
    waits = sum(count for wait, count in counts.waits.items() if not any(part in wait for part in decoding))
    assert waits <= WAITS_A_BATCH * 3, counts
    for path in sorted((tmp_path / "cuda").rglob("*.parquet")):
        found, expected = pq.read_table(path), pq.read_table(Path(here) / path.relative_to(tmp_path / "cuda"))
        if "embeddings" in path.parts:  # CUDA's convolutions are channels-last, which rounds otherwise
            near = [np.array(table.column(1).combine_chunks().storage.flatten()) for table in (found, expected)]
            np.testing.assert_allclose(*(values.astype(np.float32) for values in near), atol=2e-3)
        else:
            assert found.equals(expected), path


def test_a_step_on_a_gpu_has_the_loss_of_a_cpu_and_waits_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teachers = {"vit": {"model": open_clip_model(tmp_path / "vit"), "logit_scale": 20.0}}
    dataset = small_dataset(tmp_path, (16,), teachers=teachers)
    config = {
        "student": {"model": student_folder(tmp_path / "student")},
        "data": {"datasets": dataset, "workers": 0, "window": 12},
        "loss": {"lambda": 0.7},
        "train": {"steps": 9, "batch": 8, "optimizer": {"warmup": 1}, "ema": 0.9},
    }
    losses, _ = _three_steps(monkeypatch, {**config, "output": str(tmp_path / "on-cpu")})
    with stand_in_cuda() as cuda:
        set_enabled(True)
        monkeypatch.setattr(loop, "_LEAST_COMPILED", 9)
        found, steps = _three_steps(monkeypatch, {**config, "output": str(tmp_path / "on-cuda")}, cuda)
    assert ("the trained model", "compile") in {(one.model, one.path) for one in snapshot()}, "by default"
    assert found == pytest.approx(losses, rel=1e-5)
    for counts, in_use in steps[1:]:  # the first makes the optimizer's state
        assert counts.synchronizations <= WAITS_A_STEP, counts
        assert not any(copy.blocking for copy in counts.copies if copy.bytes > 64), counts
        assert in_use < 1.01 * steps[0][1]
        assert not RAISING & counts.by_name.keys(), "strict determinism ends the training"


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


def _three_steps(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], cuda: StandIn | None = None
) -> tuple[list[float], list[tuple[Counts, int]]]:
    """The losses of a training, what each step has counted, and the memory in use after it.

    The training is interrupted then, since its checkpoint, its evaluation and its export would take longer.
    """
    losses: list[Any] = []
    steps: list[tuple[Counts, int]] = []
    compute, run = loop.backpropagate, loop._Loop._step

    def watched(*arguments: Any) -> StepOutput:
        output = compute(*arguments)
        losses.append(sum(output.losses.values()))
        return output

    def counted(*arguments: Any) -> int:
        if len(steps) == 3:
            raise KeyboardInterrupt
        with cuda.counted() if cuda else contextlib.nullcontext(Counts()) as counts:
            signum = run(*arguments)
        steps.append((counts, cuda.allocated if cuda else 0))
        return signum

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(loop, "backpropagate", watched)
        patch.setattr(loop._Loop, "_step", counted)
        train(config)
    return [float(loss) for loss in losses[-3:]], steps  # after those of a plain and of a compiled step
