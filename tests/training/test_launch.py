"""Where a training runs, what ends it, its config sections and length, and the mailbox between driver and ranks."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import reinforce.processes.signals
from reinforce.errors import UserError
from reinforce.processes.signals import Stopped, StopSignal
from reinforce.storage import Storage
from reinforce.training.config import MUTABLE_KEYS, Training, describe_changes, fixed_config, total_steps
from reinforce.training.launch import launch, runs_on_ray
from reinforce.training.mailbox import Mailbox
from reinforce.training.task import Batch, Reading
from tests.helpers.trainings import PairFeed, TowersTask, builder, job, training

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_ray_train_is_used_for_several_ranks_or_an_address_but_not_under_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ranks, address, environment, on_ray in (
        (1, None, {}, False),
        (2, None, {}, True),
        (1, "auto", {}, True),
        (1, None, {"RAY_ADDRESS": "auto"}, True),
        (2, "auto", {"RANK": "0", "WORLD_SIZE": "2"}, False),
    ):
        for name in ("RAY_ADDRESS", "RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert runs_on_ray(job(tmp_path, compute={"ranks": ranks}), address) == on_ray


class CountingFeed(PairFeed):
    """Notes torch's threads, and what was asked of it."""

    def __init__(self, loaders: int) -> None:
        super().__init__()
        self.loaders, self.threads = loaders, 0
        self.asked: tuple[int, int | None] | None = None

    def set_up(self, ranks: int, batch: int, loaders: int, streams: int | None = None) -> Reading:
        self.asked = loaders, streams
        return Reading(self.loaders, f"{self.loaders} loaders", streams or 6, ("read in six streams",))

    def batches(self, rank: int, ranks: int, batch: int, start: int) -> Iterator[Batch]:
        self.threads = torch.get_num_threads()
        yield from super().batches(rank, ranks, batch, start)


def test_a_training_uses_all_cores_unless_the_config_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("reinforce.training.ranks.available_cores", lambda: 16)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = torch.get_num_threads()
    for compute, cpus, threads in (({}, 16, 13), ({"cpus": 2}, 2, 2)):
        feed, output = CountingFeed(3), tmp_path / str(cpus)
        launch(lambda _, feed=feed: (TowersTask(), feed), job(output, steps=3, compute=compute))
        assert (feed.threads, feed.asked) == (threads, (1, None))
        shown = f"1 rank x {cpus} CPUs, 3 loaders, device cpu\nread in six streams\ntwo towers\n"
        assert capsys.readouterr().out.startswith(shown)
        assert torch.get_num_threads() == before
    launch(lambda _: (TowersTask(), feed), job(output, steps=4, compute=compute))
    assert feed.asked == (1, 6), "what the checkpoint records"


def test_a_second_training_with_the_same_output_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with Storage(str(tmp_path)).lock(), pytest.raises(UserError, match="another run is writing to"):
        launch(builder(), job(tmp_path))
    assert launch(builder(), job(tmp_path, steps=3)).steps == 3


def test_a_signal_ends_an_interruptible_block_and_only_a_later_one_the_training_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop = StopSignal()
    with pytest.raises(Stopped), stop.interruptible():
        stop.request(signal.SIGINT)
    with pytest.raises(Stopped), stop.interruptible():
        raise AssertionError("the block was entered")
    stop.request(signal.SIGTERM)
    assert stop.signum == signal.SIGINT, "a signal that torchrun repeats is ignored"
    monkeypatch.setattr(reinforce.processes.signals, "_REPEAT_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        stop.request(signal.SIGINT)


def test_the_mailbox_passes_each_line_once_and_lets_no_rank_start_after_the_end() -> None:
    async def exchange() -> None:
        mailbox, closed = Mailbox(), Mailbox()
        for bar in ("a", "b"):
            await mailbox.show(f"line {bar}")
            await mailbox.show(bar=(bar, 1, 9))
        assert [await mailbox.report_start(rank, "here") for rank in (0, 1, 0)] == [0, 0, 1]
        assert await mailbox.read_screen() == (["line a", "line b"], ("b", 1, 9), 2), "the last bar, and restarts"
        assert (await mailbox.read_screen())[:2] == ([], None)
        assert (await mailbox.status()).hosts == {0: "here", 1: "here"}
        waiting = asyncio.create_task(mailbox.wait_for_stop())
        await mailbox.request_stop(15)
        status = await mailbox.status()
        assert not status.stop_received, "no rank has it yet"
        assert (await waiting, status.stop_received) == (15, False), "the rank may have died while it waited"
        await mailbox.confirm_stop()
        assert (await mailbox.status()).stop_received
        await mailbox.report_end(1, user_error="wrong")
        status = await mailbox.status()
        assert (status.user_errors, status.stopped_by) == ({1: "wrong"}, 0), "the ranks have not stopped yet"
        await mailbox.report_end(0, signum=15)
        status = await mailbox.status()
        assert (status.user_errors, status.stopped_by) == ({1: "wrong"}, 15)
        assert await mailbox.report_start(0, "here") is None, "a restart cannot fix a user error"
        await closed.set_controller("controller")
        assert await closed.close() == "controller"
        assert await closed.report_start(0, "here") is None, "the training has ended"
        with pytest.raises(RuntimeError, match="the training run has ended"):
            await closed.set_controller("one that starts late")

    asyncio.run(exchange())


def test_the_mailboxs_process_imports_neither_torch_nor_open_clip() -> None:
    code = "import sys; import reinforce.training.mailbox\nsys.exit(not {'torch', 'open_clip'}.isdisjoint(sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_checkpoint_format_depends_on_these_keys() -> None:
    """Checkpoints store the fixed config. A key that is renamed, or added with a value, makes stored ones refused."""
    optimizer = ("betas", "eps", "final_lr", "grad_clip_norm", "lr", "warmup", "weight_decay")
    keys = {"batch", "compute.precision", "ema", *(f"optimizer.{name}" for name in optimizer)}
    added = {f"optimizer.{name}" for name in ("hold", "towers", "layer_decay", "cooldown", "decay")}
    now = fixed_config(training(), MUTABLE_KEYS)
    assert now.keys() == keys | added
    defaults = Training(steps=1).optimizer
    assert (defaults.lr, defaults.final_lr, defaults.betas, defaults.weight_decay) == (1e-3, 1e-6, (0.9, 0.95), 0.2)
    assert describe_changes({key: now[key] for key in keys}, now) == [], "keys without a value"
    assert "steps" not in fixed_config(training(), ["steps"])
    assert "steps" in fixed_config(training(), ["step"]), "a mutable key does not hide keys that begin like it"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 2}, "give either `steps` or `epochs`"),
        ({"steps": None}, "give either `steps` or `epochs`"),
        ({"optimizer": {"hold": 3, "cooldown": 0.5}}, "`hold` and `cooldown` both state when .* remove one"),
        ({"compute": {"accumulate": 0}}, "must be a number of microbatches, at least 1, or auto, got 0"),
        ({"compute": {"ranks": 2, "accumulate": 3}}, r"batch \(16\) must be a multiple of .* \(6\)"),
        ({"compute": {"ranks": 2, "gpus": 0.5}}, r"0\.5 of an accelerator for each .* set compute\.gpus to 1"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        training(**changes)


def test_the_length_is_given_in_steps_or_in_epochs_and_must_suit_batch_warm_up_and_cool_down() -> None:
    def steps(ranks: int = 1, **changes: Any) -> int:
        return total_steps(training(**changes), samples=64, ranks=ranks)

    assert steps(steps=12) == 12
    assert steps(steps=None, epochs=2.5) == 10  # 2.5 x 64 / 16
    assert steps(steps=None, epochs=0.01, optimizer={"warmup": 0}) == 1
    assert steps(steps=10, optimizer={"warmup": 5, "cooldown": 0.5}) == 10
    refused: list[tuple[dict[str, Any], str]] = [
        ({"ranks": 3, "compute": {"accumulate": 2}}, r"train\.batch \(16\) must be a multiple of .* \(6\)"),
        ({"steps": 12, "optimizer": {"warmup": 12}}, r"warmup \(12\) must be below the training's 12 steps"),
        ({"steps": None, "epochs": 0.5, "optimizer": {"warmup": 2}}, r"warmup \(2\) must be below .* 2 steps"),
        ({"steps": 10, "optimizer": {"warmup": 6, "cooldown": 0.5}}, r"cooldown \(0\.5\) begins within the warm-up"),
    ]
    for changes, message in refused:
        with pytest.raises(UserError, match=message):
            steps(**changes)
