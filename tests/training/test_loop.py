"""The training loop: resuming, refusals, skipped steps, averages, logs and results."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from reinforce.errors import UserError
from reinforce.processes.signals import Stopped, StopSignal
from reinforce.storage import Storage
from reinforce.training.checkpoints import CheckpointFolder, Progress
from reinforce.training.config import Job
from reinforce.training.loop import run_rank
from reinforce.training.ranks import Ranks
from reinforce.training.results import Results
from teachers.fast_paths.usage import Usage, enabled, fast_path
from teachers.runtime.accelerator import Accelerator
from tests.helpers.stand_in_cuda import stand_in_cuda
from tests.helpers.trainings import PairFeed, TowersTask, curve, job, rows, run, stopped_after

pytestmark = pytest.mark.usefixtures("no_pictures")


def state_at_the_end(output: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((output / "checkpoints").glob("*.safetensors"))[-1])


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3, "norm": True}])
def test_a_stopped_training_resumes_bit_for_bit(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Readers take event files of one second in the order of their names, which end with this number as text: 10 is
    # before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    changes: dict[str, Any] = {"ema": 0.9, "compute": {"accumulate": 2}}
    run(job(tmp_path / "whole", evaluate_every=4, **changes), **options)
    parted = job(tmp_path / "parted", evaluate_every=4, **changes)
    stopped_after(3, parted, **options)
    stopped_after(8, parted, ends=True, **options)
    feed = PairFeed()
    results, _ = run(parted, feed, **options)
    assert feed.seen[0] == 8, "the feed resumes at the next step"
    assert curve(tmp_path / "parted") == curve(tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "parted") if "loss" in row] == list(range(1, 13))
    whole, again = state_at_the_end(tmp_path / "whole"), state_at_the_end(tmp_path / "parted")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    metrics = [
        [(r["step"], r["metrics"]) for r in rows(tmp_path / name) if "metrics" in r] for name in ("whole", "parted")
    ]
    assert metrics[0] == metrics[1]
    assert [step for step, _ in metrics[0]] == [4, 8, 12]
    assert results.seconds > 0
    events = EventAccumulator(str(tmp_path / "parted/tensorboard"))
    events.Reload()
    shown = sorted((event.step, event.value) for event in events.Scalars("loss"))
    assert [step for step, _ in shown] == list(range(1, 13))
    np.testing.assert_allclose([value for _, value in shown], curve(tmp_path / "parted"), rtol=1e-6)
    numbers = {"losses/contrast", "lr", "scalars/logit_scale", "grad_norm", "metrics/sharpness"}
    assert numbers <= set(events.Tags()["scalars"])


def test_rows_after_the_last_checkpoint_are_replaced_and_other_data_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A killed training leaves rows after its last checkpoint, and a truncated row."""

    class SmallerFeed(PairFeed):
        samples = 48

    killed = job(tmp_path, checkpoints={"every": 4, "keep": 1})
    stopped_after(4, killed)
    assert "samples now" not in capsys.readouterr().out
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "loss": 77.0, "losses": {}, "lr": 1.0}\n{"step": 6, "lo')
    run(killed, SmallerFeed())
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == list(range(1, 13))
    assert 77.0 not in curve(tmp_path)
    assert "an epoch has 48 samples now and had 64 at the last checkpoint" in " ".join(capsys.readouterr().out.split())
    feed = PairFeed()
    feed.files = "others"
    other = job(tmp_path / "files")
    stopped_after(3, other)
    stopped_after(6, other)
    assert "the last checkpoint" not in capsys.readouterr().out
    run(job(tmp_path / "files", compute={"accumulate": 4}), feed)
    shown = " ".join(capsys.readouterr().out.split())
    assert "divided into 1 rank x 4 parts now and was divided into 1 rank x 1 part at the last checkpoint" in shown
    assert "the files with the samples have changed since the last checkpoint, though not their number" in shown


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: content[:-9] + b"x" + content[-8:]])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[bytes], bytes]
) -> None:
    run(job(tmp_path / "whole", checkpoints={"every": 4}))
    parted = job(tmp_path / "parted", checkpoints={"every": 4, "keep": 1})
    stopped_after(10, parted)
    older, newest = sorted((tmp_path / "parted/checkpoints").iterdir())
    assert [path.name for path in (older, newest)] == ["step-000000008.safetensors", "step-000000010.safetensors"]
    newest.write_bytes(damage(newest.read_bytes()))
    capsys.readouterr()
    feed = PairFeed()
    run(parted, feed)
    assert feed.seen == [8, 9, 10, 11]
    shown = " ".join(capsys.readouterr().out.split())
    assert len(re.findall(rf"{newest} is not a whole checkpoint .*: resuming from the one of step 8 ", shown)) == 1
    assert curve(tmp_path / "parted") == curve(tmp_path / "whole")
    whole, again = state_at_the_end(tmp_path / "whole"), state_at_the_end(tmp_path / "parted")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    for path in (tmp_path / "parted/checkpoints").iterdir():
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"step-000000012.safetensors is not a whole .*, and no earlier one is left"):
        run(parted)


def test_a_finished_training_returns_its_results_without_training_and_can_be_made_longer(tmp_path: Path) -> None:
    first, _ = run(job(tmp_path))
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    feed = PairFeed()
    again, _ = run(job(tmp_path), feed)
    assert again == first
    assert feed.seen == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == stamps
    assert (first.steps, first.samples, first.export) == (12, 192, "student")
    longer, _ = run(job(tmp_path, steps=None, epochs=3.75))
    assert (longer.steps, longer.samples) == (15, 240)  # 3.75 x 64 / 16
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == list(range(1, 16))
    assert rows(tmp_path)[3]["epoch"] == 1.0


def test_a_training_that_is_lengthened_after_its_rate_began_to_decay_says_what_happens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(output: str, stop: int, before: int, steps: int, **optimizer: Any) -> str:
        options = {"optimizer": {"lr": 0.02, "warmup": 2, "final_lr": 0.0, "decay": "linear", **optimizer}}
        made = job(tmp_path / output, steps=before, **options)
        stopped_after(stop, made) if stop < before else run(made)
        capsys.readouterr()
        run(job(tmp_path / output, steps=steps, **options))
        return " ".join(capsys.readouterr().out.split())

    line = (
        "the training has 24 steps now and had 12 at the last checkpoint, so its learning rate decays otherwise: "
        "it was 0.01 in step 10 and is 0.02 in the next one. What else depends on the length"
    )
    assert line in shown("cooling", 10, 12, 24, cooldown=1 / 3)
    assert "learning rate decays" not in shown("before its cool-down", 8, 12, 24, cooldown=1 / 3)
    assert "it was 0 in step 6 and is" in shown("finished", 6, 6, 12)


def test_a_signal_during_an_evaluation_ends_it_at_once_and_it_is_made_on_resume(tmp_path: Path) -> None:
    class Slow(TowersTask):
        def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(600)
            raise AssertionError("the evaluation was not interrupted")

    before = signal.getsignal(signal.SIGINT)  # shells let background processes ignore it
    with pytest.raises(Stopped) as raised:
        run(job(tmp_path), task=Slow())
    assert raised.value.status == 130
    assert signal.getsignal(signal.SIGINT) is before, "the handlers are restored"
    feed = PairFeed()
    results, _ = run(job(tmp_path), feed)
    assert (feed.seen, results.metrics.keys()) == ([], {"sharpness", "weight"})
    assert (tmp_path / "student/weights/right.json").exists()


def test_a_checkpoint_of_another_config_length_or_model_is_refused(tmp_path: Path) -> None:
    stopped_after(6, job(tmp_path))
    with pytest.raises(UserError) as raised:
        run(job(tmp_path, batch=32, optimizer={"lr": 0.02, "warmup": 3}))
    assert "batch: 16 before, 32 now" in str(raised.value)
    assert "optimizer.warmup: 2 before, 3 now" in str(raised.value)
    assert "betas" not in str(raised.value)
    with pytest.raises(UserError, match="is already at step 6, beyond the 5 steps of this config"):
        run(job(tmp_path, steps=5))
    with pytest.raises(UserError, match=r"(?s)checkpoint of step 6 in .* is of another model: .*size mismatch"):
        run(job(tmp_path), width=20)
    run(job(tmp_path, steps=8, log_every=2, checkpoints={"every": 3}, compute={"accumulate": 4}, retries=0))
    with_model = partial(replace, job(tmp_path / "folder"))
    stopped_after(6, with_model(model_config={"size": 48, "width": 16}))
    with pytest.raises(UserError, match=r"of another config:\n  size: 48 before, 32 now\nWrite to another `output`"):
        run(with_model(model_config={"size": 32, "width": 16}))
    results, _ = run(with_model(model_config={"size": 48, "width": 16}))
    assert results.steps == 12


def test_a_training_resumes_on_the_same_data_only(tmp_path: Path) -> None:
    """A key of the config that the data resolve may be stated later."""

    def resumed(data: dict[str, Any], steps: int, **config: Any) -> Progress:
        made = job(tmp_path, steps=steps, evaluate_every=1)
        run(replace(made, fixed_config={**made.fixed_config, **config}), PairFeed(data=data))
        return CheckpointFolder(Storage(str(tmp_path)), 1).load(steps)[0]

    first = {"data.teachers": ["a"], "url: embeddings/a/images": "4f3e"}
    assert resumed(first, 3, **{"data.teachers": None}).data == first
    with pytest.raises(UserError) as raised:
        resumed({"data.teachers": ["b"], "url: embeddings/b/images": "4f3e"}, 4, **{"data.teachers": None})
    assert str(raised.value).startswith(
        f"{tmp_path} has a training on other data:\n  data.teachers: ['a'] before, ['b'] now\n"
        "  url: embeddings/a/images: '4f3e' before, not set now\n"
        "  url: embeddings/b/images: not set before, '4f3e' now\n"
    )
    with pytest.raises(UserError, match="'4f3e' before, '0000' now"):
        resumed({**first, "url: embeddings/a/images": "0000"}, 4, **{"data.teachers": None})
    assert resumed(first, 4, **{"data.teachers": ["a"]}).data == first


def test_precision_auto_is_recorded_as_what_it_was_and_must_be_the_same_on_resume(tmp_path: Path) -> None:
    def stated(precision: str) -> Job:
        made = job(tmp_path, steps=4, compute={"precision": precision})
        return replace(made, fixed_config={"train.compute.precision": precision})

    stopped_after(2, stated("auto"))
    with pytest.raises(UserError, match=r"train\.compute\.precision: 'fp32' before, 'bf16' now"):
        run(stated("bf16"))
    run(stated("fp32"))
    with stand_in_cuda():
        assert Accelerator("cuda", "auto").precision == "bf16"


def test_the_average_is_evaluated_and_exported(tmp_path: Path) -> None:
    """It follows average += (1 - decay) (weight - average), with the stated warm-up of the decay."""
    results, task = run(job(tmp_path, ema=0.5, checkpoints={"every": 1, "keep": 99}, steps=6))
    weights = [
        load_file(path)["model/right.weight"] for path in sorted((tmp_path / "checkpoints").glob("*.safetensors"))
    ]
    average = weights[0]
    for step, weight in enumerate(weights[1:], start=2):
        average = average + max(1 - 0.5, (1 + step - 1) ** -0.75) * (weight - average)
    exported = torch.tensor(json.loads((tmp_path / "student/weights/right.json").read_text()))
    torch.testing.assert_close(exported, average)
    assert results.metrics["weight"] == pytest.approx(float(average.sum()), abs=1e-5)
    assert not torch.allclose(exported, task.model.right.weight.detach(), atol=1e-4)


def test_steps_without_a_finite_gradient_are_skipped_and_counted(tmp_path: Path) -> None:
    results, _ = run(job(tmp_path, checkpoints={"every": 1, "keep": 99}), PairFeed(poisoned=range(4, 7)))
    assert results.skipped == 3
    found = rows(tmp_path)
    assert [row["skipped"] for row in found if "loss" in row] == [0, 0, 0, 0, 1, 2, 3, 3, 3, 3, 3, 3]
    assert [row["step"] for row in found if row.get("loss", 0) is None] == [5, 6, 7]
    assert math.isfinite(curve(tmp_path)[-1])
    before, after = (load_file(tmp_path / f"checkpoints/step-00000000{step}.safetensors") for step in (4, 7))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    results, _ = run(job(tmp_path / "at its end", steps=24), PairFeed([2, 3, 22, 23]))
    assert results.skipped == 4


@pytest.mark.parametrize(
    ("steps", "poisoned", "count"),
    [
        (40, range(3, 40), "20 steps in a row up to step 23"),
        (15, range(1, 15), "14 steps in a row up to step 15, the last one"),
        (24, range(21, 24), "3 steps in a row up to step 24, the last one"),
        (12, range(2, 12, 3), "4 of 12 steps up to step 12, the last one"),
        (60, range(0, 60, 2), "20 of 39 steps up to step 39, so"),
    ],
)
def test_a_training_fails_with_many_updates_skipped_or_the_last_ones(
    tmp_path: Path, steps: int, poisoned: range, count: str
) -> None:
    """Neither results nor weights are written, however often it is started."""
    made = job(tmp_path, steps=steps, checkpoints={"every": 2})
    for _ in range(2):
        with pytest.raises(UserError, match=f"not finite in {count}.*Lower train.optimizer.lr.*in another `output`"):
            run(made, PairFeed(poisoned))
    assert not (tmp_path / "results.json").exists()
    assert not (tmp_path / "student").exists()


def test_the_logit_scale_is_clamped_to_100(tmp_path: Path) -> None:
    _, task = run(job(tmp_path, steps=4), scale=1000.0)
    scales = [row["scalars"]["logit_scale"] for row in rows(tmp_path) if "loss" in row]
    assert scales[0] == pytest.approx(1000)
    assert all(scale <= 100.001 for scale in scales[1:])
    assert task.model.logit_scale.item() <= math.log(100) + 1e-6


def test_the_logit_scale_is_at_least_1(tmp_path: Path) -> None:
    _, task = run(job(tmp_path, steps=4), scale=0.5)
    scales = [row["scalars"]["logit_scale"] for row in rows(tmp_path) if "loss" in row]
    assert scales[0] == pytest.approx(0.5)
    assert all(scale >= 1 for scale in scales[1:])
    assert task.model.logit_scale.item() >= 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's writer
@pytest.mark.parametrize("limit", [900, 2000, 20_000])
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(tmp_path: Path, limit: int) -> None:
    """Limits of a file's size stand for a full disk: in the log, in a checkpoint, and in the export."""

    class Large(TowersTask):
        def export(self, model: torch.nn.Module, folder: str) -> None:
            save_file({"w": torch.zeros(6000)}, Path(folder, "large.safetensors"))

    made = job(tmp_path, checkpoints={"every": 4})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        line = rf"^{tmp_path}.* cannot be written: .*File too large.*; make room in .*\.$"
        with pytest.raises(UserError, match=line):
            run(made, task=Large())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "results.json").exists()
    assert [path.name for path in (tmp_path / ".tmp").iterdir()] == []
    assert run(made)[0].steps == 12


@pytest.mark.usefixtures("own_fast_paths")
def test_results_have_the_calls_of_fast_paths_and_plain_trainings_have_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(made: Job) -> Results:
        def build(_: Accelerator) -> tuple[TowersTask, PairFeed]:
            if enabled():
                fast_path("held_weights").used = 3
                fast_path("fused_attention", asked=True).fall_back("no attention")
            return TowersTask(), PairFeed()

        return run_rank(build, made, Ranks(0, 1, Accelerator("cpu")), StopSignal())

    fast_path("compile").used = 1  # of an earlier training in this process
    first = train(job(tmp_path / "fast", steps=3))
    paths = Usage("", "held_weights", used=3), Usage("", "fused_attention", asked=True, reason="no attention")
    assert first.fast_paths == paths
    assert train(job(tmp_path / "fast", steps=3)) == first, "as results.json has them"
    stored = json.loads((tmp_path / "fast" / "results.json").read_text())
    assert stored["fast_paths"][0] == {**vars(Usage("", "held_weights", used=3))}
    line = "a model: fast path `fused_attention: true` fell back: no attention; `fused_attention: false` turns it off"
    assert line in first.summary().splitlines()
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    compiled = job(tmp_path / "plain", steps=3, compute={"compile": True})
    assert train(replace(compiled, accelerator="plain")).fast_paths == ()
    monkeypatch.setenv("REINFORCE_ACCELERATOR", "plain")
    assert train(replace(compiled, output=str(tmp_path / "variable"))).fast_paths == ()


@pytest.mark.slow
def test_a_compiled_model_has_the_same_curve(tmp_path: Path) -> None:
    run(job(tmp_path / "plain", steps=5))
    run(job(tmp_path / "compiled", steps=5, compute={"compile": True}))
    np.testing.assert_allclose(curve(tmp_path / "compiled"), curve(tmp_path / "plain"), rtol=1e-4)
    plain, compiled = state_at_the_end(tmp_path / "plain"), state_at_the_end(tmp_path / "compiled")
    assert plain.keys() == compiled.keys()
