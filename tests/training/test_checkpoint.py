"""Checkpoints: content, cleaning up, damage, and processes that are killed while they write."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from reinforce.dataset.files.store import Store
from reinforce.errors import UserError
from reinforce.training.distributed.ranks import Ranks
from reinforce.training.loop import fit
from reinforce.training.saving.checkpoint import BestCheckpoint, Checkpoints, Progress
from reinforce.training.saving.writer import CheckpointWriter
from teachers.device.accelerator import Accelerator
from tests.helpers.trainings import PairFeed, TowersTask, job


def checkpoints(folder: Path, keep: int = 2) -> Checkpoints:
    return Checkpoints(Store(str(folder)), keep)


def test_header_and_tensors_are_loaded_as_they_were_saved(tmp_path: Path) -> None:
    progress = Progress(7, {"train.batch": 16, "data.teachers": None, "train.optimizer.betas": [0.9, 0.95]}, 1.5, 2)
    tied = torch.randn(3)
    tensors = {
        "model/w": torch.randn(3, 4).T,
        "model/scale": torch.tensor(2.5),
        "model/steps": torch.tensor(3),
        "model/bf": torch.randn(2, 2).bfloat16(),
        "model/a": tied,
        "model/b": tied,
        "model/conv": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    }
    made = checkpoints(tmp_path)
    with CheckpointWriter(made) as writer:
        writer.save(progress, tensors)
    found, loaded = made.load(7)
    assert found == progress
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "checkpoints/step-000000007.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_checkpoint_written_in_a_thread_has_the_bytes_of_the_state_when_it_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tied = torch.randn(3)
    conv = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    tensors = {"a": tied, "b": tied, "conv": conv, "scale": torch.tensor(2.5), "bf": torch.randn(2).bfloat16()}
    for step in (1, 2):
        separate = {name: (step * tensor).contiguous() for name, tensor in tensors.items()}
        checkpoints(tmp_path / "plain").save(Progress(step, {}), separate)
    begin, write = threading.Event(), Checkpoints.save

    def late(*arguments: Any) -> None:
        begin.wait(600)
        write(*arguments)

    monkeypatch.setattr(Checkpoints, "save", late)
    with CheckpointWriter(checkpoints(tmp_path / "thread")) as writer:
        writer.save(Progress(1, {}), tensors)
        for tensor in (tied, conv, tensors["scale"], tensors["bf"]):
            tensor.mul_(2)  # the training goes on
        assert not (tmp_path / "thread/checkpoints").exists()
        begin.set()
        writer.save(Progress(2, {}), tensors)
        assert not writer.failed
    for step in (1, 2):
        plain, thread = (tmp_path / name / f"checkpoints/step-{step:09d}.safetensors" for name in ("plain", "thread"))
        assert _content(thread) == _content(plain)


def _content(path: Path) -> tuple[dict[str, Any], bytes]:
    """The JSON header, whose keys safetensors writes in any order, and all bytes after it."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


@pytest.mark.parametrize("every", [2, 100])
def test_a_checkpoint_that_cannot_be_written_ends_the_training_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", f"{tmp_path}/checkpoints/x")

    monkeypatch.setattr(Checkpoints, "save", full)
    feed = PairFeed()
    with pytest.raises(UserError, match=r"cannot be written: .*No space left.*checkpoints/x.*; make room"):
        fit(TowersTask(), feed, job(tmp_path, steps=40, checkpoints={"every": every}), Ranks(0, 1, Accelerator("cpu")))
    assert (feed.seen[-1] < 39) == (every == 2)
    assert not (tmp_path / "results.json").exists()


def test_the_header_format_stays(tmp_path: Path) -> None:
    """Checkpoints of earlier versions must load: these keys may not change."""
    checkpoints(tmp_path).save(Progress(7, {"train.batch": 16}, 1.5, 2), {"model/w": torch.ones(1)})
    with safe_open(tmp_path / "checkpoints/step-000000007.safetensors", framework="pt") as file:
        header = file.metadata()
    expected = '{"version": 1, "step": 7, "course": {"train.batch": 16}, "seconds": 1.5, "skipped": 2}'
    assert header == {"reinforce.checkpoint": expected, "reinforce.checksum": "crc32:5f29dd5b"}


def test_a_checkpoint_of_an_earlier_version_has_no_checksum_and_loads(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step-000000007.safetensors"
    path.parent.mkdir()
    header = '{"version": 1, "step": 7, "course": {"train.batch": 16}, "seconds": 1.5, "skipped": 2}'
    save_file({"model/w": torch.ones(2)}, path, metadata={"reinforce.checkpoint": header})
    progress, tensors = checkpoints(tmp_path).load(7)
    assert progress == Progress(7, {"train.batch": 16}, 1.5, 2)
    assert torch.equal(tensors["model/w"], torch.ones(2))


def test_a_changed_bit_in_a_checkpoint_is_found(tmp_path: Path) -> None:
    made = checkpoints(tmp_path)
    made.save(Progress(7, {"train.batch": 16}), {"model/w": torch.ones(6), "model/b": torch.zeros(3)})
    path = tmp_path / "checkpoints" / "step-000000007.safetensors"
    sound = path.read_bytes()
    for place in [sound.index(b"16}") + 1, *range(len(sound) - 36, len(sound))]:  # the config, and all values
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        with pytest.raises(UserError, match=r"step-000000007.safetensors is not .*checksum is wrong.*Delete it"):
            made.load(7)


def test_the_latest_and_the_best_are_kept(tmp_path: Path) -> None:
    made = checkpoints(tmp_path, keep=2)
    for step, value in enumerate([0.1, 0.7, 0.3, 0.7, 0.2, 0.5], start=1):
        made.save(Progress(step, {}), {"model/w": torch.ones(1)})
        made.update_best(step, "top1", value)
    assert made.steps() == [2, 5, 6]
    assert made.best() == BestCheckpoint(2, "top1", 0.7)
    assert made.update_best(7, "recall", 0.1) == BestCheckpoint(7, "recall", 0.1), "another metric"


@pytest.mark.parametrize("damage", [b"", b"not safetensors", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_file_that_is_not_a_checkpoint_is_named(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "checkpoints" / "step-000000003.safetensors"
    path.parent.mkdir()
    path.write_bytes(damage)
    with pytest.raises(UserError, match=r"step-000000003.safetensors is not a checkpoint.*Delete it"):
        checkpoints(tmp_path).load(3)


def sizes(folder: Path) -> Iterator[int]:
    """Sizes of the files in a folder, which may disappear meanwhile."""
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            yield path.stat().st_size


def test_a_process_killed_while_writing_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    script = (
        "import sys, torch; from reinforce.dataset.files.store import Store\n"
        "from reinforce.training.saving.checkpoint import *\n"
        "made = Checkpoints(Store(sys.argv[1]), 2)\n"
        "made.save(Progress(1, {}), {'model/w': torch.ones(4)})\n"
        "print('first', flush=True)\n"
        "made.save(Progress(2, {}), {f'model/{i}': torch.ones(5_000_000) for i in range(12)})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "first\n"
    deadline = time.monotonic() + 600
    while not any(size > 1_000_000 for size in sizes(tmp_path / ".tmp")):
        assert process.poll() is None, "the process finished before it could be killed"
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = checkpoints(tmp_path)
    assert made.steps() == [1]
    assert torch.equal(made.load(1)[1]["model/w"], torch.ones(4))
    with Store(str(tmp_path)).lock():
        assert [p.name for p in (tmp_path / ".tmp").iterdir()] == ["lock"], "the unfinished file is deleted"
