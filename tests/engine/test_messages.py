"""Errors that travel from a worker to the driver, with the frames of the user's code; the stage of each lease, as a
worker reports it."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from reinforce.config import parse_config
from reinforce.engine.messages import LayerFailure, error_with_frames, shorten, user_frames
from reinforce.engine.plan.plan import build_layers, describe_models
from reinforce.engine.pulse import (
    DECODING,
    PREPARING,
    READING,
    WAITING,
    LeaseWatch,
    WorkerWatch,
)
from reinforce.engine.worker.models import load_models
from reinforce.engine.worker.producers.registry import check_models
from reinforce.engine.worker.self_test import TEXTS
from reinforce.errors import UserError
from tests.engine.worker.test_actor import LocalWorker
from tests.helpers.data import config_of, tree

TOKEN = "hf_t0ken-of-eve"
CODE = f"""
import json
import torch
from tests.helpers.models import TextOnly

class Ill(TextOnly):
    version = 1

    def __init__(self, device, fail="never", hf_token=""):
        super().__init__(device)
        self.fail, self.token = fail, hf_token
        if fail == "load":
            json.loads("nothing")

    def encode_texts(self, texts):
        if self.fail == "test" or (self.fail == "run" and not {{*texts}} <= {{*{TEXTS!r}}}):
            self.look_up(texts)
        if self.fail == "torch":
            torch.ones(2) @ torch.ones(3)
        return super().encode_texts(texts)

    def look_up(self, texts):
        raise ValueError(f"unknown text, {{self.token}}")
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Return a function that writes a module with a teacher that fails, and returns a config with it."""

    def config(source: str, code: str = CODE, **options: str) -> dict[str, Any]:
        name = f"{tmp_path.name.replace('-', '_')}_lab"
        (tmp_path / f"{name}.py").write_text(code)
        ill = {"class": f"{name}:Ill", "options": options}
        return config_of(source, tmp_path / "out", captioners={}, teachers={"ill": ill})

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return config


def start(config: dict[str, Any]) -> None:
    """Load and test the models of a config."""
    parsed = parse_config(config)
    layers = build_layers(parsed, describe_models(parsed))
    check_models(load_models(parsed, layers.values()), layers.values(), {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"fail": "load"},
            r"Expecting value.* \(\w+_lab\.py:13 in __init__: `json\.loads\(\"nothing\"\)`\)",
        ),
        (
            {"fail": "test"},
            r"ValueError: unknown text.* \(\w+_lab\.py:17 in encode_texts: `self\.look_up\(texts\)` -> \w+_lab\.py:23",
        ),
        (
            {"fail": "torch"},
            r"RuntimeError: .* \(\w+_lab\.py:19 in encode_texts: `torch\.ones\(2\) @ torch\.ones\(3\)`\)",
        ),
        (
            {"code": "\nimport no_such_thing\n"},
            r"cannot be imported: .*\w+_lab\.py:2 in <module>: `import no_such_thing`\)",
        ),
    ],
)
def test_an_error_at_the_start_shows_the_users_code(
    write: Callable[..., dict[str, Any]], options: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        start(write("x.tar", **options))


def test_an_error_in_a_run_names_its_layer_and_shows_the_users_code_and_no_secrets(
    write: Callable[..., dict[str, Any]], shards: Callable[..., str], tmp_path: Path
) -> None:
    worker = LocalWorker(write(shards(3), fail="run", hf_token=TOKEN))
    with pytest.raises(LayerFailure) as raised:
        worker.run()
    text = str(raised.value)
    assert text.startswith("embeddings/ill/caption: ValueError: unknown text, (secret) (")
    assert re.search(r"\(\w+_lab\.py:17 in encode_texts: `self\.look_up\(texts\)` -> ", text)
    assert re.search(r"-> \w+_lab\.py:23 in look_up: `raise ValueError\(f\"unknown text, \{self\.token\}\"\)`\)$", text)
    assert TOKEN not in text
    assert tree(tmp_path / "out") == {}, "nothing is committed"


def test_errors_without_code_of_the_user_are_unchanged() -> None:
    import huggingface_hub

    for call in (lambda: parse_config([]), lambda: huggingface_hub.hf_hub_download("a//b", "c")):  # type: ignore[arg-type]
        with pytest.raises(Exception) as raised:  # noqa: PT011
            call()
        error = raised.value.with_traceback(raised.value.__traceback__.tb_next.tb_next)  # type: ignore[union-attr]
        assert user_frames(error) == ""
        assert error_with_frames(error) == f"{type(error).__name__}: {error}"


def test_the_frames_of_a_recursion_are_bounded_and_long_texts_keep_their_ends() -> None:
    def dive(depth: int) -> None:
        if depth == 0:
            raise ValueError("deep")
        dive(depth - 1)

    with pytest.raises(ValueError, match="deep") as raised:
        dive(50)
    frames = user_frames(raised.value)
    assert frames.count(" in ") == 5
    assert frames.endswith('`raise ValueError("deep")`)')
    assert " -> ... -> " in frames
    assert os.getcwd() not in frames
    assert shorten("short", 10) == "short"
    assert shorten("a" * 50 + "b" * 50, 15) == "aaaaa ... bbbbb"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def at(watch: LeaseWatch, now: float) -> tuple[str, str, float]:
    pulse = watch.pulse(prepared_at=0.0, now=now)
    return pulse.stage, pulse.what, pulse.seconds


def test_a_lease_is_in_the_innermost_stage_and_entering_and_leaving_one_is_progress(clock: list[float]) -> None:
    watch = LeaseWatch("a")
    assert at(watch, 107.0) == (PREPARING, "", 7.0)
    with watch.stage("embeddings/t/images", "4 rows"):
        clock[0] = 110.0
        with watch.stage("inner"):
            assert at(watch, 110.5) == ("inner", "", 0.5)
        assert at(watch, 111.0) == ("embeddings/t/images", "4 rows", 1.0)
    clock[0] = 120.0
    assert at(watch, 120.0) == (PREPARING, "", 10.0)


def test_a_lease_is_where_its_main_thread_is_unless_another_of_its_threads_runs_a_model(clock: list[float]) -> None:
    worker = WorkerWatch()
    with worker.lease("a") as lease, ThreadPoolExecutor(1) as other, contextlib.ExitStack() as stages:
        with lease.stage(WAITING):
            other.submit(stages.enter_context, lease.stage("model", "batch 1")).result()
            clock[0] += 5.0
            assert at(lease, clock[0]) == ("model", "batch 1", 5.0)

        with lease.stage(READING):
            assert at(lease, clock[0]) == ("model", "batch 1", 5.0)
            other.submit(stages.close).result()
            clock[0] += 1.0
            assert at(lease, clock[0]) == (READING, "", 1.0)
        assert at(lease, clock[0])[0] == PREPARING


def test_the_time_and_the_slowest_step_of_each_stage_of_the_main_thread_are_kept_also_of_steps_that_raise(
    clock: list[float],
) -> None:
    slowest: dict[str, float] = {}
    watch = LeaseWatch("a", slowest)
    clock[0] += 1.0
    with watch.stage(WAITING), ThreadPoolExecutor(1) as other:
        clock[0] += 2.0
        for seconds in (1.0, 2.5, 0.5):
            with contextlib.suppress(ValueError), watch.stage("model"):
                clock[0] += seconds
                raise ValueError("odd")
        clock[0] += 8.0
        other.submit(watch.stage("elsewhere").__enter__).result()
    clock[0] += 16.0
    assert watch.take_seconds() == {PREPARING: 17.0, WAITING: 10.0, "model": 4.0}
    assert slowest == {WAITING: 14.0, "model": 2.5}


def test_each_item_that_is_read_is_a_step_and_what_the_consumer_does_is_not(clock: list[float]) -> None:
    slowest: dict[str, float] = {}
    watch = LeaseWatch("a", slowest)
    seen = []

    def items() -> Iterator[int]:
        for number in range(3):
            clock[0] += 2.0
            seen.append(at(watch, clock[0]))
            yield number

    for _ in watch.steps(READING, items()):
        clock[0] += 50.0
    assert seen == [(READING, f"after {number} of its samples", 2.0) for number in range(3)]
    assert slowest == {READING: 2.0}


def test_images_that_decode_processes_finish_are_progress_of_leases_that_wait_for_them(clock: list[float]) -> None:
    worker = WorkerWatch()
    with worker.lease("a") as a, worker.lease("b") as b, a.stage(DECODING, "key 'k'"), b.stage("model"):
        clock[0] = 200.0
        assert [(one.shard, one.seconds) for one in worker.pulses(0, 200.0)] == [("a", 100.0), ("b", 100.0)]
        assert [(one.shard, one.seconds) for one in worker.pulses(7, 210.0)] == [("a", 0.0), ("b", 110.0)]
        assert [one.seconds for one in worker.pulses(7, 215.0)] == [5.0, 115.0]
    assert worker.pulses(7, 215.0) == ()
