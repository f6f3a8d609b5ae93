"""The command line: a user error prints one message with the fix and exits with status 2."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

import reinforce
from reinforce.cli import app
from reinforce.cli.common import only_json
from reinforce.dataset.manifest import read_manifest, record_scales, write_manifest
from reinforce.dataset.store import Store
from reinforce.engine.preflight.check_machines import cluster_machines, heic_note
from reinforce.processes.imports import reads_heic
from tests.helpers import command_line, pages_commands
from tests.helpers.commands import Command, Printed
from tests.helpers.data import config_of, members_of, write_tar

ROOT = Path(__file__).parents[2]


def write_config(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_a_user_error_is_one_message_that_names_the_place(
    refused: Printed, shards: Callable[..., str], tmp_path: Path
) -> None:
    good = config_of(shards(2), tmp_path / "out")
    (tmp_path / "in-the-way").write_text("a file")
    for changes, message in (
        ({"teecher": {}}, "teecher: unknown key; known keys here"),
        ({"teachers": {"mine": {"model": f"local-dir:{tmp_path}/nowhere"}}}, f"{tmp_path}/nowhere"),
        ({"teachers": {"dfn": {"model": "ViT-L-14", "pretrained": "dfn2b"}}}, "use model ViT-L-14-quickgelu"),
        ({"teachers": {"mine": {"class": "tests.helpers.models:Colours"}}}, "Colours"),
        ({"source": f"{tmp_path}/none/*.tar"}, f"{tmp_path}/none/*.tar"),
        ({"output": f"{tmp_path}/in-the-way/out"}, "cannot be written"),
    ):
        err = refused("run", write_config(tmp_path, {**good, **changes}))
        assert (err.startswith("error: "), message in err, "Traceback" in err) == (True, True, False), message
    assert not list(tmp_path.glob("out/samples/*")), "nothing was started"


def test_plan_run_and_status_report_the_state_of_the_dataset(
    command: Command, refused: Printed, shards: Callable[..., str], tmp_path: Path, ray_session: None,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = config_of(shards(4, 4), tmp_path / "out")
    config["teachers"]["red"]["options"]["delay"] = 0.01  # seconds are recorded with three digits
    path = write_config(tmp_path, config)
    assert "2 shards, 2 with something missing" in command("plan", path)[1]
    assert not (tmp_path / "out").exists(), "plan writes nothing"
    planned = json.loads(command("plan", path, "--json")[1])
    assert (planned["shards"], planned["pending_shards"]) == (2, 2)
    assert planned["layers"]["captions/namer"]["missing"] == 2
    assert planned["layers"]["samples"]["expected_bytes"] > 1000
    assert planned["first_sample"]["caption"] == "thing 0 of shard 0"
    assert planned["first_sample"]["captions"] == ["thing 0 of shard 0"]
    assert planned["first_sample"]["size"] == [40, 30]
    assert {"tests.helpers.models:ColorTeacher"} <= {*planned["classes"]}
    assert planned["estimate"]["hours"] is None, "no model was measured"
    assert json.loads(command("plan", path, "--rate", "10", "--price", "3600", "--json")[1])["estimate"]["cost"] == 0.8
    assert "plan has 1 error:\n  rate: Input should be greater than 0" in command("plan", path, "--rate", "0")[2]
    [node] = cluster_machines()
    assert (node.shm_bytes is not None, node.reads_heic) == (True, reads_heic()), "the node was asked"
    assert planned["estimate"]["workers"] == 1, "workers.max of the config"

    with monkeypatch.context() as patch:  # as if this process lacked a decoder that workers have, or had another
        patch.setattr("reinforce.engine.driver.driver.reads_heic", lambda: not reads_heic())
        status, out, err = command("run", path, "--json")
    assert status == 0
    ended = json.loads(out)
    assert [note for note in ended["notes"] if "pillow-heif" in note] == [
        heic_note(f"workers, the first on {socket.gethostname()}")
    ]
    assert (ended["samples"], ended["shards"], ended["status"], ended["message"]) == (8, 2, 0, "done")
    [summary] = (tmp_path / "out" / "runs").glob("*/summary.json")
    assert ended == {"output": str(tmp_path / "out"), **json.loads(summary.read_text())}
    assert "batches of 16 images" in err, "the log is on standard error"

    assert "nothing to do" in command("run", path)[1]
    write_tar(tmp_path / "source" / "00002.tar", members_of(2, 4))
    assert "4 images at " in command("plan", path)[1], "the rate is that of the run"
    (tmp_path / "source" / "00002.tar").unlink()
    assert "0 with something missing" in command("plan", path)[1]
    out = command("status", str(tmp_path / "out"))[1]
    for name in ("samples", "captions/namer", "embeddings/red/images", "[2, 8] float16"):
        assert name in out
    store = Store(str(tmp_path / "out"))
    write_manifest(store, record_scales(read_manifest(store), {"red": 43.0}, "tuned"))
    status, out, _ = command("run", path, "--set", "teachers.red.logit_scale=75.0")
    assert (status, "nothing to do" in out) == (0, True)
    assert "logit scale 75 of this config replaces 43 (tuned)" in caplog.text
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert manifest["teachers"]["red"]["logit_scale"] == 75.0, "no layer depends on the scale"
    assert manifest["teachers"]["blue"]["logit_scale"] == 30.0
    assert manifest["teachers"]["blue"]["logit_scale_from"] == "model"
    for verb in ("run", "plan"):
        err = refused(verb, path, "--set", "seed=1")
        assert ("fingerprint" in err, "another `output`" in err) == (True, True)


def commands() -> list[list[str]]:
    return [
        [group.name, *([command] if command else [])]
        for group in get_command(app).commands.values()
        for command in getattr(group, "commands", [""])
    ]


# --- commands and options


def test_commands_and_options_are_those_that_are_recorded() -> None:
    recorded = command_line.FILE.read_text(encoding="utf-8")
    found = command_line.describe()
    assert found == recorded, (
        f"the command line has changed:\n{command_line.difference(found, recorded)}\n"
        "Scripts of users depend on it. If the change is intended, name it in CHANGELOG.md and run:\n"
        f"{command_line.RENEW}"
    )


def test_every_help_explains_all_options_and_has_short_examples_that_the_parser_accepts(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert command("--version") == (0, f"reinforce {reinforce.__version__}\n", "")
    with pytest.raises(Exception, match="--sett"):
        pages_commands.check(shlex.split("reinforce run configs/demo.yaml --sett seed=1"))
    program = get_command(app)
    for name in [[], *commands(), ["export"]]:
        status, out, _ = command(*name, "--help")
        assert status == 0
        for config in re.findall(r"configs/[\w-]+\.yaml", out):
            assert "YOUR-BUCKET" not in (ROOT / config).read_text(), "an example runs as it is, after `make demo`"
        if name == ["export", "onnx"]:
            assert ".[export]'" in out, "the name of an extra"
        found = program
        for part in name:
            found = found.commands[part]
        assert found.help
        assert [parameter.name for parameter in found.params if not getattr(parameter, "help", "")] == []
        examples = re.findall(r"^ \$ (.*?) *$", out, re.MULTILINE)
        assert examples
        for example in examples:
            words = shlex.split(example)
            assert words[: len(name) + 1] == ["reinforce", *name]
            pages_commands.check(words)  # also that the configs exist


# --- errors


@pytest.fixture
def defect(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect of the program: reading a status raises an error that nobody has foreseen."""

    def fail(url: str) -> None:
        raise KeyError("s3://me:secret@bucket/x?sig=1")

    monkeypatch.setattr("reinforce.dataset.status.read_status", fail)


def test_an_unexpected_error_is_one_line_that_says_what_to_do(command: Command, defect: None) -> None:
    status, out, err = command("status", "somewhere")
    assert (status, out) == (1, "")
    assert re.match(r"error: unexpected KeyError: 's3://bucket/x' \(test_commands\.py:\d+\)\. `reinforce --debug ", err)
    assert "report it" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["plan", "tune"])
def test_a_command_that_handles_no_signal_ends_after_sigterm_with_one_line_and_status_143(
    name: str, tmp_path: Path
) -> None:
    """It reads its config from a pipe, which this test has open and writes nothing to."""
    os.mkfifo(pipe := tmp_path / "config.yaml")
    command = [sys.executable, "-m", "reinforce", name, str(pipe)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        writer = os.open(pipe, os.O_WRONLY)  # waits for the command to open it
        time.sleep(0.5)  # until it reads: Python handles a signal that comes just before when the read returns
        process.send_signal(signal.SIGTERM)
        printed = process.communicate(timeout=50)
        os.close(writer)
    assert (process.returncode, printed) == (143, ("", "stopped by SIGTERM\n"))


def test_debug_shows_the_traceback(
    command: Command, defect: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for debug in (["--debug"], []):
        if not debug:
            monkeypatch.setenv("REINFORCE_DEBUG", "1")
        status, _, err = command(*debug, "status", "somewhere")
        assert status == 1
        assert "Traceback (most recent call last)" in err
        assert "secret" not in err
        assert err.splitlines()[-1].startswith("error: unexpected KeyError")
    monkeypatch.undo()
    status, _, err = command("--debug", "status", str(tmp_path))
    assert (status, "Traceback" in err) == (2, True), "of a user error, too"
    assert "is not a reinforced dataset" in err.splitlines()[-1]
    assert "Traceback" not in command("status", str(tmp_path))[2], "debug holds for one command"


# --- JSON


def test_only_json_reaches_standard_output_whatever_else_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    with only_json() as print_json:
        print("a log")
        subprocess.run(["echo", "from a child"], check=True)
        print_json({"url": "s3://me:secret@b/\u00e4?sig=1", "loss": float("nan"), "path": Path("x"), "pair": (1, None)})
        print("more")
    print("after")
    out, err = capfd.readouterr()
    text, _, after = out.rpartition("}\n")
    assert json.loads(text + "}") == {"url": "s3://b/\u00e4", "loss": None, "path": "x", "pair": [1, None]}
    assert after == "after\n"
    assert [line for line in err.splitlines() if line] == ["a log", "from a child", "more"]


def keys_in(value: Any) -> set[str]:
    """Every key at any depth."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {*(value if isinstance(value, dict) else ()), *(key for one in inner for key in keys_in(one))}


def test_the_page_names_keys_that_plan_prints(command: Command, shards: Callable[..., str], tmp_path: Path) -> None:
    path = write_config(tmp_path, config_of(shards(2), tmp_path / "out"))
    printed = json.loads(command("plan", path, "--json")[1])
    page = (ROOT / "docs/command-line.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| `reinforce plan --json` |"))
    named = set(re.findall(r"`([a-z_]+)`", row))
    assert {"layers", "expected_bytes", "estimate"} <= named
    assert named - keys_in(printed) == set()
    assert printed.keys() - named == set(), "every key at the top is documented"
