"""Checkpoints: content, cleaning up, and damage."""

from __future__ import annotations

import errno
import json
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from reinforce.dataset.store import Store
from reinforce.errors import UserError
from reinforce.training.checkpoints import (
    BestCheckpoint,
    CheckpointFolder,
    CheckpointWriter,
    DamagedCheckpoint,
    Progress,
)
from tests.helpers.stand_in_cuda import stand_in_cuda
from tests.helpers.trainings import PairFeed, job, run


def checkpoints(folder: Path, keep: int = 2) -> CheckpointFolder:
    return CheckpointFolder(Store(str(folder)), keep)


def test_a_checkpoint_written_in_a_thread_has_the_bytes_of_the_state_when_it_was_saved_and_is_loaded_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tied = torch.randn(3)
    conv = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    tensors = {"a": tied, "b": tied, "conv": conv, "scale": torch.tensor(2.5), "bf": torch.randn(2).bfloat16()}
    config = {"train.batch": 16, "data.teachers": None, "train.optimizer.betas": [0.9, 0.95]}
    for step in (1, 2):
        separate = {name: (step * tensor).contiguous() for name, tensor in tensors.items()}
        checkpoints(tmp_path / "plain").save(Progress(step, config, 1.5, 2), separate)
    begin, write = threading.Event(), CheckpointFolder.save

    def late(*arguments: Any) -> None:
        begin.wait(600)
        write(*arguments)

    monkeypatch.setattr(CheckpointFolder, "save", late)
    with CheckpointWriter(checkpoints(tmp_path / "thread")) as writer:
        writer.save(Progress(1, config, 1.5, 2), tensors)
        for tensor in (tied, conv, tensors["scale"], tensors["bf"]):
            tensor.mul_(2)  # the training goes on
        assert not (tmp_path / "thread/checkpoints").exists()
        begin.set()
        writer.save(Progress(2, config, 1.5, 2), tensors)
        assert not writer.failed
    for step in (1, 2):
        plain, thread = (tmp_path / name / f"checkpoints/step-{step:09d}.safetensors" for name in ("plain", "thread"))
        assert _content(thread) == _content(plain)
    found, loaded = checkpoints(tmp_path / "thread").load(2)
    assert found == Progress(2, config, 1.5, 2)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_copies_go_to_memory_that_is_not_pinned_where_no_more_can_be_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with stand_in_cuda() as cuda:
        tensors = {name: torch.randn(3, device="cuda") for name in "abc"}
        pin, pinned = cuda.pin, []

        def pin_one(address: int, size: int, owner: Any = None) -> None:
            pinned.append(size)
            if len(pinned) > 1:
                raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")
            pin(address, size, owner)

        monkeypatch.setattr(cuda, "pin", pin_one)
        with CheckpointWriter(checkpoints(tmp_path)) as writer:
            for step in (1, 2):
                writer.save(Progress(step, {}), tensors)
        _, loaded = checkpoints(tmp_path).load(2)
        assert all(torch.equal(loaded[name], tensor.cpu()) for name, tensor in tensors.items())
    assert pinned == [12, 12], "it is tried once"
    [line] = caplog.messages
    assert line.endswith("not pinned, which is slower: CUDA error: out of memory")


def _content(path: Path) -> tuple[dict[str, Any], bytes]:
    """The JSON header, whose keys safetensors writes in any order, and all bytes after it."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


@pytest.mark.parametrize("every", [2, 20, 100])
def test_a_checkpoint_that_cannot_be_written_ends_the_training_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", f"{tmp_path}/checkpoints/x")

    monkeypatch.setattr(CheckpointFolder, "save", full)
    feed = PairFeed()
    with pytest.raises(UserError, match=r"cannot be written: .*No space left.*checkpoints/x.*; make room"):
        run(job(tmp_path, steps=40, checkpoints={"every": every}), feed)
    assert (feed.seen[-1] < 39) == (every < 100)
    assert not (tmp_path / "results.json").exists()


def test_the_header_format_stays_and_a_file_without_a_checksum_is_not_whole(tmp_path: Path) -> None:
    """Checkpoints of 1.0 must load: these keys may not change."""
    progress = Progress(7, {"train.batch": 16}, 1.5, 2)
    checkpoints(tmp_path).save(progress, {"model/w": torch.ones(1)})
    path = tmp_path / "checkpoints/step-000000007.safetensors"
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    unset = ("streams", "samples", "model_config", "data", "division", "files", "part", "steps", "compiled")
    expected = {"version": 1, "step": 7, "fixed_config": {"train.batch": 16}, "seconds": 1.5, "skipped": 2}
    text = json.dumps({**expected, **dict.fromkeys(unset), "skipped_last": 0})
    content = f"{text}model/w torch.float32 [1]".encode() + torch.ones(1).numpy().tobytes()
    assert header == {"reinforce.checkpoint": text, "reinforce.checksum": f"crc32:{zlib.crc32(content):08x}"}
    assert checkpoints(tmp_path).load(7)[0] == progress
    save_file({"model/w": torch.ones(2)}, path, metadata={"reinforce.checkpoint": text})
    with pytest.raises(DamagedCheckpoint, match="is not a whole checkpoint"):
        checkpoints(tmp_path).load(7)


@pytest.mark.parametrize("keep", [1, 2])
def test_the_latest_two_and_the_best_are_kept(tmp_path: Path, keep: int) -> None:
    made = checkpoints(tmp_path, keep)
    for step, value in enumerate([0.1, 0.7, 0.3, 0.7, 0.2, 0.5], start=1):
        made.save(Progress(step, {}), {"model/w": torch.ones(1)})
        made.update_best(step, "top1", value)
    assert made.steps() == [2, 5, 6]
    assert made.best() == BestCheckpoint(2, "top1", 0.7)
    made.update_best(7, "recall", 0.1)
    assert made.best() == BestCheckpoint(7, "recall", 0.1), "another metric"


def test_a_damaged_one_does_not_count_among_the_latest_and_is_deleted_unless_it_is_saved_again(tmp_path: Path) -> None:
    made = checkpoints(tmp_path, keep=1)
    for step in (1, 2, 3):
        made.save(Progress(step, {}), {"model/w": torch.ones(1)})
    (tmp_path / "checkpoints/step-000000003.safetensors").write_bytes(b"")
    for saved, kept in ((4, [2, 4]), (3, [3, 4])):
        with pytest.raises(DamagedCheckpoint):
            made.load(3)
        made.save(Progress(saved, {}), {"model/w": torch.ones(1)})
        assert made.steps() == kept
        Path(tmp_path, "checkpoints/step-000000003.safetensors").write_bytes(b"")


def test_a_file_that_is_no_checkpoint_or_has_a_changed_bit_is_named(tmp_path: Path) -> None:
    made = checkpoints(tmp_path)
    made.save(Progress(3, {"train.batch": 16}), {"model/w": torch.ones(6), "model/b": torch.zeros(3)})
    path = tmp_path / "checkpoints" / "step-000000003.safetensors"
    sound = path.read_bytes()
    places = [sound.index(b"16}") + 1, *range(len(sound) - 36, len(sound))]  # the config, and all values
    changed = [sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :] for place in places]
    for number, damage in enumerate([b"", b"not safetensors", b"\x02\0\0\0\0\0\0\0{}", *changed]):
        path.write_bytes(damage)
        why = "checksum is wrong" if number > 2 else ""
        with pytest.raises(DamagedCheckpoint, match=rf"step-000000003.safetensors is not a whole checkpoint.*{why}"):
            made.load(3)


def test_one_of_a_newer_version_is_not_a_damaged_one(tmp_path: Path) -> None:
    made, path = checkpoints(tmp_path), tmp_path / "checkpoints/step-000000003.safetensors"
    path.parent.mkdir()
    header = {"version": 1, "step": 3, "fixed_config": {}, "seconds": 1.5, "skipped": 2}
    for newer in ({"version": 2}, {"of_later": 1}):
        text = json.dumps({**header, **newer})
        content = f"{text}model/w torch.float32 [1]".encode() + torch.ones(1).numpy().tobytes()
        metadata = {"reinforce.checkpoint": text, "reinforce.checksum": f"crc32:{zlib.crc32(content):08x}"}
        save_file({"model/w": torch.ones(1)}, path, metadata=metadata)
        with pytest.raises(UserError, match=r"was written by a newer version of this program\. Upgrade") as raised:
            made.load(3)
        assert not isinstance(raised.value, DamagedCheckpoint)
