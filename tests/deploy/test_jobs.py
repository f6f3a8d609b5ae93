"""The Slurm script and the task of SkyPilot run one Ray cluster for a job, and notices of a preemption drain a node."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests.helpers.waiting import wait_for

ROOT = Path(__file__).parents[2]

#: A command that writes its arguments to $CALLS, and then does what its name needs.
FAKE = """#!{python}
import os, signal, sys, time
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
def log(text):
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(text + "\\n")
def stop(*_):
    log(f"{{name}} is stopped: {{' '.join(arguments[:3])}}")
    os._exit(1)
signal.signal(signal.SIGTERM, stop)
if name == "scontrol" and arguments[0] == "show":
    print("node-a\\nnode-b\\nnode-c")
    sys.exit()
log(" ".join([name, *arguments]))
if name == "srun":
    rest = arguments[arguments.index("ray"):]
    os.execvp(rest[0], rest)
if name == "ray" and arguments[0] == "start":
    time.sleep(60)
if name == "reinforce":
    while ("\\n" + open(os.environ["CALLS"]).read()).count("\\nray start ") < int(os.environ.get("STARTS", "1")):
        time.sleep(0.05)
    time.sleep(float(os.environ.get("RUN_SECONDS", "0.2")))
    sys.exit(int(os.environ.get("RUN_STATUS", "0")))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    for name in ("srun", "scontrol", "ray", "reinforce"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(FAKE.format(python=sys.executable))
        path.chmod(0o755)
    return {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "CALLS": str(tmp_path / "calls"),
        "CONFIG": "my.yaml",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def calls(environment: dict[str, str]) -> list[str]:
    path = Path(environment["CALLS"])
    return path.read_text().splitlines() if path.exists() else []


def wait_for_call(environment: dict[str, str], start: str) -> None:
    wait_for(lambda: any(call.startswith(start) for call in calls(environment)), lambda: calls(environment))


@pytest.fixture
def slurm(environment: dict[str, str]) -> dict[str, str]:
    job = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "node-[a-c]", "SLURM_CPUS_ON_NODE": "8"}
    return {**environment, **job, "SLURM_GPUS_ON_NODE": "2", "STARTS": "3", "VENV": "/nowhere"}


COMMAND = ["bash", "deploy/slurm/reinforce.sbatch"]


def test_a_slurm_job_starts_ray_on_each_of_its_nodes_and_ends_with_the_status_of_the_run(slurm: dict[str, str]) -> None:
    done = subprocess.run(
        COMMAND, cwd=ROOT, env={**slurm, "RUN_STATUS": "3"}, capture_output=True, text=True, timeout=600, check=False
    )
    assert os.access(ROOT / COMMAND[1], os.X_OK)
    assert done.returncode == 3, done.stderr
    wait_for_call(slurm, "ray is stopped: start --head")
    found = calls(slurm)
    starts = [call for call in found if call.startswith("ray start")]
    assert sorted(call.split()[2] for call in starts) == ["--address=node-a:24242"] * 2 + ["--head"]
    assert all("--num-cpus=8 --num-gpus=2" in call and call.endswith("--block") for call in starts)
    nodes = [word for call in found if call.startswith("srun") for word in call.split() if "nodelist" in word]
    assert sorted(nodes) == ["--nodelist=node-a", "--nodelist=node-b", "--nodelist=node-c"]
    assert "reinforce run my.yaml --address node-a:24242" in found
    assert not any("requeue" in call for call in found)


@pytest.mark.parametrize("notice", [signal.SIGUSR1, signal.SIGTERM])
def test_a_slurm_job_that_is_preempted_stops_the_run_and_is_queued_again(
    notice: signal.Signals, slurm: dict[str, str]
) -> None:
    job = subprocess.Popen(COMMAND, cwd=ROOT, env={**slurm, "RUN_SECONDS": "60"}, stdout=subprocess.PIPE, text=True)
    wait_for_call(slurm, "reinforce run")
    job.send_signal(notice)
    output, _ = job.communicate(timeout=600)
    assert job.returncode == 0
    assert "queued again" in output
    found = calls(slurm)
    assert found.index("reinforce is stopped: run my.yaml --address") < found.index("scontrol requeue 4242")


@pytest.mark.parametrize("rank", [0, 1])
def test_the_task_of_skypilot_starts_a_head_with_the_run_and_nodes_beside_it(
    rank: int, environment: dict[str, str]
) -> None:
    (venv := Path(environment["HOME"]) / "venv/bin").mkdir(parents=True)
    (venv / "activate").touch()
    sky = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": str(rank)}
    environment |= {**sky, "SKYPILOT_NUM_GPUS_PER_NODE": "4", "RUN_STATUS": "2"}
    task = yaml.safe_load((ROOT / "deploy/skypilot/reinforce.yaml").read_text())
    with subprocess.Popen(["bash", "-c", task["run"]], env=environment) as job:
        wait_for_call(environment, "reinforce run" if rank == 0 else "ray start")
        if rank == 0:
            assert job.wait(600) == 2
            assert "reinforce run my.yaml --address 10.0.0.1:6479" in calls(environment)
        else:
            Path(environment["PATH"].split(":")[0], "ray").unlink()  # the head does not answer any more
            assert job.wait(600) == 0
            assert "reinforce" not in " ".join(calls(environment))
    wait_for_call(environment, "ray is stopped: start --block")
    where = "--head --port 6479" if rank == 0 else "--address 10.0.0.1:6479"
    assert any(call.startswith("ray start --block --num-gpus 4") and where in call for call in calls(environment))


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "deploy")
    return importlib.import_module("drain_on_notice")


def answer(module: ModuleType, monkeypatch: pytest.MonkeyPatch, answers: dict[str, str]) -> None:
    def fetch(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
        if url.endswith("instance-action"):
            assert headers == {"X-aws-ec2-metadata-token": "secret"}
        return answers.get(url.rsplit("/", maxsplit=1)[-1])

    monkeypatch.setattr(module, "fetch", fetch)


def test_a_notice_gives_the_seconds_that_are_left_and_machines_that_stay_have_none(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for answers in ({}, {"preempted": "FALSE"}, {"token": "secret"}):
        answer(module, monkeypatch, answers)
        assert module.seconds_left() is None
    answer(module, monkeypatch, {"preempted": "TRUE"})
    assert module.seconds_left() == 30
    end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=100)
    action = {"action": "terminate", "time": end.strftime("%Y-%m-%dT%H:%M:%SZ")}
    answer(module, monkeypatch, {"token": "secret", "instance-action": json.dumps(action)})
    assert 95 <= module.seconds_left() <= 100


def test_a_notice_drains_the_node_with_its_deadline(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([None, None, 42])
    commands: list[list[str]] = []
    monkeypatch.setattr(module, "seconds_left", lambda: next(answers))
    monkeypatch.setattr(module, "_SECONDS", 0.0)
    monkeypatch.setattr(module.subprocess, "run", lambda command, check: commands.append(command))
    module.main()
    assert [command[:2] for command in commands] == [["ray", "drain-node"]]
    assert "--deadline-remaining-seconds=42" in commands[0]
