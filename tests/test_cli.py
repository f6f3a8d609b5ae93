"""The command line: a user error prints one message with the fix and exits with status 2."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from reinforce.cli import app, main
from tests.helpers.data import config_of

Command = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parent.parent


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """Run a command; returns the exit status, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        out, err = capfd.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), out, err

    return run


def write_config(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def user_errors(folder: Path, source: str) -> dict[str, tuple[dict[str, Any], str]]:
    """A config with each error, and a part of the message, by the name of the error."""
    good = config_of(source, folder / "out")
    (folder / "in-the-way").write_text("a file")
    return {
        "unknown key": ({**good, "teecher": {}}, "known keys here"),
        "wrong type": ({**good, "seed": "one"}, "seed: Input should be a valid integer, got 'one'"),
        "missing weights": (
            {**good, "teachers": {"mine": {"model": f"local-dir:{folder}/nowhere"}}},
            f"{folder}/nowhere",
        ),
        "missing checkpoint file": (
            {**good, "teachers": {"mine": {"model": "ViT-B-32", "pretrained": f"{folder}/none.pt"}}},
            f"{folder}/none.pt",
        ),
        "quick-gelu mismatch": (
            {**good, "teachers": {"dfn": {"model": "ViT-L-14", "pretrained": "dfn2b"}}},
            "ViT-L-14-quickgelu",
        ),
        "unknown class": ({**good, "teachers": {"mine": {"class": "tests.helpers.models:Colours"}}}, "Colours"),
        "unknown option": (
            {**good, "teachers": {"mine": {"class": "tests.helpers.models:ColorTeacher", "options": {"sice": 3}}}},
            "sice",
        ),
        "no match": ({**good, "source": f"{folder}/none/*.tar"}, f"{folder}/none/*.tar"),
        "unreadable source": ({**good, "source": f"{folder}/none/{{0..9}}.tar"}, "does not exist"),
        "unwritable output": ({**good, "output": f"{folder}/in-the-way/out"}, "cannot be written"),
    }


USER_ERRORS = [
    "unknown key", "wrong type", "missing weights", "missing checkpoint file", "quick-gelu mismatch", "unknown class",
    "unknown option", "no match", "unreadable source", "unwritable output",
]  # fmt: skip


@pytest.mark.parametrize("error", USER_ERRORS)
def test_a_user_error_is_one_message_that_names_the_place(
    command: Command, shards: Callable[..., str], tmp_path: Path, error: str
) -> None:
    config, message = user_errors(tmp_path, shards(2))[error]
    status, out, err = command("run", write_config(tmp_path, config))
    assert status == 2
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in out + err
    assert not list(tmp_path.glob("out/samples/*")), "nothing was started"


def test_run_and_plan_report_a_changed_fingerprint(
    command: Command, shards: Callable[..., str], tmp_path: Path, ray_session: None
) -> None:
    config = config_of(shards(3), tmp_path / "out")
    assert command("run", write_config(tmp_path, config))[0] == 0
    path = write_config(tmp_path, {**config, "seed": 1})
    for verb in ("run", "plan"):
        status, _, err = command(verb, path)
        assert status == 2
        assert "fingerprint" in err
        assert "another `output`" in err


def test_plan_run_and_status_report_the_state_of_the_dataset(
    command: Command, shards: Callable[..., str], tmp_path: Path, ray_session: None
) -> None:
    path = write_config(tmp_path, config_of(shards(4, 4), tmp_path / "out"))
    status, out, _ = command("plan", path)
    assert status == 0
    assert "2 shards, 2 with something missing" in out
    assert not (tmp_path / "out").exists(), "plan writes nothing"

    status, out, _ = command("run", path)
    assert status == 0
    assert "8 samples" in out
    assert "accelerator busy" in out

    status, out, _ = command("plan", path)
    assert "0 with something missing" in out
    status, out, _ = command("status", str(tmp_path / "out"))
    assert status == 0
    for name in ("samples", "captions/namer", "embeddings/red/images", "[2, 8] float16"):
        assert name in out
    status, out, _ = command("run", path, "--set", "teachers.red.logit_scale=75.0")
    assert (status, "nothing to do" in out) == (0, True)
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert manifest["teachers"]["red"]["logit_scale"] == 75.0, "no layer depends on the scale"
    assert manifest["teachers"]["blue"]["logit_scale"] == 30.0
    assert manifest["teachers"]["blue"]["logit_scale_from"] == "model"


def test_a_model_with_a_wrong_output_shape_fails_before_the_run_starts(
    command: Command, shards: Callable[..., str], tmp_path: Path, ray_session: None
) -> None:
    config = config_of(shards(3), tmp_path / "out")
    config["teachers"] = {"odd": {"class": "tests.helpers.models:WrongShapeTeacher"}}
    status, _, err = command("run", write_config(tmp_path, config))
    assert status == 2
    assert "odd" in err
    assert "(3, 7)" in err
    assert not list(tmp_path.glob("out/samples/*"))


def test_status_of_another_folder_is_a_user_error(command: Command, tmp_path: Path) -> None:
    status, _, err = command("status", str(tmp_path))
    assert (status, "is not a reinforced dataset" in err) == (2, True)


def commands() -> list[list[str]]:
    return [
        [group.name, *([command] if command else [])]
        for group in get_command(app).commands.values()
        for command in getattr(group, "commands", [""])
    ]


@pytest.mark.parametrize("name", commands(), ids=" ".join)
def test_help_names_existing_configs_and_explains_every_option(command: Command, name: list[str]) -> None:
    status, out, _ = command(*name, "--help")
    assert status == 0
    for example in re.findall(r"configs/[\w-]+\.yaml", out):
        assert "YOUR-BUCKET" not in (ROOT / example).read_text(), "an example runs as it is, after `make demo`"
    found = get_command(app)
    for part in name:
        found = found.commands[part]
    assert found.help
    assert [parameter.name for parameter in found.params if not getattr(parameter, "help", "")] == []


def test_help_shows_the_name_of_an_extra(command: Command) -> None:
    assert ".[export]'" in command("export", "onnx", "--help")[1]
    assert ".[export]'" in command("latency", "--help")[1]
