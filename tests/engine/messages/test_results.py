"""Errors that travel from a worker to the driver, with the frames of the user's code in their messages."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reinforce.config import parse_config
from reinforce.engine.inference.models import load_models
from reinforce.engine.inference.self_test import TEXTS
from reinforce.engine.messages.results import LayerFailure
from reinforce.engine.messages.tracebacks import error_with_frames, shorten, user_frames
from reinforce.engine.plan.recipe import build_layers, describe_models
from reinforce.engine.worker.producers.registry import check_models
from reinforce.errors import UserError
from tests.engine.worker.test_actor import TOKEN, LocalWorker
from tests.helpers.data import config_of

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


def test_an_error_in_a_run_shows_the_users_code_and_no_secrets(
    write: Callable[..., dict[str, Any]], shards: Callable[..., str]
) -> None:
    worker = LocalWorker(write(shards(3), fail="run", hf_token=TOKEN))
    with pytest.raises(LayerFailure) as raised:
        worker.run()
    text = str(raised.value)
    assert text.startswith("embeddings/ill/caption: ValueError: unknown text, (secret) (")
    assert re.search(r"\(\w+_lab\.py:17 in encode_texts: `self\.look_up\(texts\)` -> ", text)
    assert re.search(r"-> \w+_lab\.py:23 in look_up: `raise ValueError\(f\"unknown text, \{self\.token\}\"\)`\)$", text)
    assert TOKEN not in text


def test_errors_without_code_of_the_user_are_unchanged() -> None:
    import huggingface_hub

    for call in (lambda: parse_config([]), lambda: huggingface_hub.hf_hub_download("a//b", "c")):  # type: ignore[arg-type]
        with pytest.raises(Exception) as raised:  # noqa: PT011
            call()
        error = raised.value.with_traceback(raised.value.__traceback__.tb_next.tb_next)  # type: ignore[union-attr]
        assert user_frames(error) == ""
        assert error_with_frames(error) == f"{type(error).__name__}: {error}"


def test_the_frames_of_a_recursion_are_bounded() -> None:
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


def test_long_texts_keep_their_ends() -> None:
    assert shorten("short", 10) == "short"
    assert shorten("a" * 50 + "b" * 50, 15) == "aaaaa ... bbbbb"
