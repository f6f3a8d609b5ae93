"""`reinforce train` as users start it: killed, interrupted, on two ranks, and with errors in the config."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import yaml
from safetensors.torch import load_file

import reinforce
from reinforce.dataset.store import MANIFEST
from reinforce.processes.cores import available_cores, describe_share
from tests.helpers.commands import Command, printed_by, run_command
from tests.helpers.reinforced import manifest_to_change, small_dataset
from tests.helpers.students import student_folder
from tests.helpers.trainings import curve, rows
from tests.helpers.waiting import wait_for

ROOT = Path(__file__).parents[2]
Start = Callable[..., "Started"]
STEPS, BATCH = 40, 8  # 44 samples: an epoch ends in the middle of a step


@pytest.fixture(scope="module")
def base(labelled: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A config without its output."""
    return {
        "output": "",
        "seed": 3,
        "student": {"model": student_folder(tmp_path_factory.mktemp("student"))},
        "data": {"datasets": labelled, "workers": 0, "streams": 2, "window": 16},
        "loss": {"lambda": 0.7, "logit_scales": {"blue": 60.0}},
        "train": {
            "steps": STEPS,
            "batch": BATCH,
            "optimizer": {"lr": 0.002, "warmup": 5},
            "ema": 0.9,
            "checkpoints": {"every": 7, "keep": 2},
            "log_every": 1,
        },
        "evaluate": {"every": 20, "retrieval": {"own": {"pairs": labelled}}},
    }


@pytest.fixture(scope="module")
def undisturbed(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reinforce.training.log.draw_curves", lambda *_: None)  # half a second each
        results = reinforce.train({**base, "output": str(output)})
    assert results.steps == STEPS
    return output


def written(config: dict[str, Any], output: Path, changes: dict[str, Any] | None = None) -> str:
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**config, "output": str(output), **(changes or {})}))
    return str(path)


class Started(subprocess.Popen[str]):
    """``python -m ARGUMENTS``, in a session of its own."""

    def __init__(self, printed: Path, arguments: tuple[str, ...]) -> None:
        self._printed = printed
        with printed.open("w") as file:
            super().__init__(
                [sys.executable, "-m", *arguments],
                cwd=ROOT, stdout=file, stderr=file, start_new_session=True, text=True,
            )  # fmt: skip

    def ended(self) -> str:
        """Wait for the end -> what was printed."""
        self.wait(600)
        return self._printed.read_text()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts modules with the given arguments; at the end, those that still run are killed with their children."""
    processes: list[Started] = []

    def start(*arguments: str) -> Started:
        processes.append(Started(tmp_path / f"printed-{len(processes)}", arguments))
        return processes[-1]

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_step(process: Started, output: Path, step: int) -> None:
    """Wait until a step is logged and a checkpoint is there, which a thread writes while steps go on."""

    def reached() -> bool:
        assert process.poll() is None, process.ended()
        return any(output.glob("checkpoints/step-*")) and f'"step": {step},' in (output / "log.jsonl").read_text()

    wait_for(reached)


def assert_same(output: Path, undisturbed: Path) -> None:
    """The same rows, apart from timing and memory, and the same weights, bit for bit."""
    timing = ("samples_per_second", "flops_per_second", "waiting", "memory")
    ours, theirs = (
        [{k: v for k, v in row.items() if k not in timing} for row in rows(o)] for o in (output, undisturbed)
    )
    assert ours == theirs
    for name in (f"checkpoints/step-{STEPS:09d}.safetensors", "student/open_clip_model.safetensors"):
        one, two = load_file(output / name), load_file(undisturbed / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.usefixtures("no_pictures")
def test_a_killed_and_interrupted_training_has_the_curve_of_an_uninterrupted_one(
    start: Start, base: dict[str, Any], undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    config = written(base, output)
    killed = start("reinforce", "train", config)
    wait_for_step(killed, output, 12)
    os.kill(killed.pid, signal.SIGSTOP)  # while it holds the lock
    status, _, err = run_command(capfd, "train", config)
    assert (status, "another run is writing to" in err) == (2, True)
    killed.kill()
    killed.wait()
    reached = rows(output)[-1]["step"]
    saved = max(int(path.stem.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*"))
    assert 12 <= reached < STEPS

    interrupted = start("jobs.train_student", "--config", config, "--set", "data.workers=1")
    wait_for_step(interrupted, output, max(22, reached + 2))
    os.killpg(interrupted.pid, signal.SIGINT)  # like a terminal: loader processes get it, too
    printed = interrupted.ended()
    assert interrupted.returncode == 130, printed
    assert "run the same command again to resume from the last checkpoint" in printed
    assert f"resuming after step {saved} of" in printed
    assert "Traceback" not in printed
    stopped_at = rows(output)[-1]["step"]
    assert stopped_at < STEPS
    assert (output / f"checkpoints/step-{stopped_at:09d}.safetensors").exists()

    status, shown, printed = run_command(capfd, "train", config, "--json")
    assert status == 0
    assert json.loads(shown) == json.loads((output / "results.json").read_text()), "only JSON is on standard output"
    printed += printed_by(capfd, "train", config)
    assert f"resuming after step {stopped_at} of {STEPS}" in printed
    assert f"for {STEPS} steps on {STEPS * BATCH} samples" in printed
    assert "retrieval/own/text_to_image/r1" in printed
    assert_same(output, undisturbed)

    model = open_clip.create_model(f"local-dir:{output}/student")  # plain open_clip
    averaged = load_file(output / f"checkpoints/step-{STEPS:09d}.safetensors")
    weights = dict(model.named_parameters())
    assert torch.equal(weights["text_projection"], averaged["average/clip.text_projection"])
    results = json.loads(shown)
    assert results["steps"] == STEPS
    assert results["metrics"].keys() == {
        f"retrieval/own/{way}/r{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)
    }


@pytest.mark.slow
def test_sigterm_under_torchrun_ends_both_ranks_with_a_checkpoint_and_they_resume(
    start: Start, base: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    config = written(base, output)
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "reinforce", "train"]
    stopped = start(*command, config)
    wait_for_step(stopped, output, 10)
    stopped.terminate()
    printed = stopped.ended()
    assert stopped.returncode != 0
    stopped_at = rows(output)[-1]["step"]
    assert (output / f"checkpoints/step-{stopped_at:09d}.safetensors").exists(), printed

    done = start(*command, config)
    printed = done.ended()
    assert done.returncode == 0, printed
    assert f"resuming after step {stopped_at}" in printed
    assert printed.count(f"for {STEPS} steps on") == 1, "only rank 0 prints"
    share = describe_share(max(1, available_cores() // 2), 0)
    assert printed.count(f"2 ranks x {share}, no loader process each, device cpu") == 1
    np.testing.assert_allclose(curve(output), curve(undisturbed), rtol=2e-3)


@pytest.mark.usefixtures("no_pictures")
def test_a_training_does_not_resume_with_other_teachers_of_the_same_shards(
    base: dict[str, Any], tmp_path: Path, command: Command
) -> None:
    def reinforced(**teachers: dict[str, Any]) -> str:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return small_dataset(tmp_path, sizes=(9,), teachers=teachers)

    def train(output: str, steps: int) -> tuple[int, str]:
        changes = {"data": {**base["data"], "datasets": url}, "loss": {}, "evaluate": {}}
        warmup = {"optimizer": {"warmup": 0}}
        config = written(base, tmp_path / output, {**changes, "train": {"steps": steps, "batch": 4, **warmup}})
        status, out, err = command("train", config)
        return status, " ".join((out + err).split())

    teacher = {"class": "tests.helpers.models:ColorTeacher", "options": {"dim": 8}, "logit_scale": 50.0}
    url = reinforced(red=teacher)
    assert train("student", 2)[0] == 0
    url = reinforced(red={**teacher, "options": {"dim": 8, "seed": 1}})
    status, shown = train("student", 3)
    assert status == 2
    assert re.search(f"{url}: embeddings/red/images: '[0-9a-f]+' before, '[0-9a-f]+' now", shown)
    url = reinforced(red=teacher, blue={**teacher, "options": {"dim": 8, "seed": 1}})
    assert "data.teachers: ['red'] before, ['red', 'blue'] now" in train("student", 3)[1]
    url = reinforced(red={**teacher, "logit_scale": 60.0})
    assert "loss.logit_scales.red: 50.0 before, 60.0 now" in train("student", 3)[1]
    url = reinforced(red=teacher)
    assert train("student", 3)[0] == 0


def test_errors_in_the_config_are_reported_before_anything_starts(
    base: dict[str, Any], tmp_path: Path, command: Command
) -> None:
    data = Path(shutil.copytree(base["data"]["datasets"], tmp_path / "data"))
    manifest = manifest_to_change(data)
    manifest["teachers"]["blue"]["logit_scale"] = None
    (data / MANIFEST).write_text(json.dumps(manifest))
    errors: list[tuple[dict[str, Any], str]] = [
        ({"train": {**base["train"], "stepz": 3}}, "train.stepz: unknown key; known keys here: steps"),
        ({"data": {**base["data"], "datasets": "nowhere"}}, "nowhere"),
        ({"student": {"model": "ViT-Z-99"}}, "ViT-Z-99"),
        ({"evaluate": {"retrieval": {"own": {"pairs": "nothing-here"}}}}, "nothing-here"),
        ({"output": "/proc/no"}, "output /proc/no cannot be written"),
        ({"loss": {}, "data": {**base["data"], "datasets": str(data)}}, "teacher blue has no logit scale"),
    ]
    if not torch.cuda.is_available():
        errors.append(({"train": {**base["train"], "compute": {"gpus": 1}}}, "Set train.compute.gpus to 0"))
    for changes, message in errors:
        status, _, err = command("train", written(base, tmp_path / "out", changes))
        assert status == 2
        assert message in err
        assert not (tmp_path / "out/log.jsonl").exists()
