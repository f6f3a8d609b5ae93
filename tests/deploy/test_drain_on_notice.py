"""Notices of the metadata servers of AWS and GCP become drains of Ray."""

from __future__ import annotations

import datetime
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[2] / "deploy/drain_on_notice.py"


@pytest.fixture
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("drain_on_notice", FILE)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def answer(module: ModuleType, monkeypatch: pytest.MonkeyPatch, answers: dict[str, str]) -> None:
    def fetch(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
        if url.endswith("instance-action"):
            assert headers == {"X-aws-ec2-metadata-token": "secret"}
        return answers.get(url.rsplit("/", maxsplit=1)[-1])

    monkeypatch.setattr(module, "fetch", fetch)


def test_there_is_no_notice_on_other_machines_and_on_those_that_stay(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for answers in ({}, {"preempted": "FALSE"}, {"token": "secret"}):
        answer(module, monkeypatch, answers)
        assert module.seconds_left() is None


def test_a_notice_gives_the_seconds_that_are_left(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
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
