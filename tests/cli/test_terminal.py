"""What the command line shows in a terminal and in a pipe, how a shell completes it, and what it imports."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import Command

# --- the terminal


def in_a_terminal(*arguments: str, **variables: str) -> str:
    """Run a command with a terminal as its standard output; returns what it shows."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", **variables}
    subprocess.run([sys.executable, "-m", "reinforce", *arguments], stdout=theirs, env=environment, check=True)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    return shown.decode()


COLOUR = re.compile(r"\x1b\[[\d;]*(3[0-79]|4[0-79]|38|48|9[0-7])[\d;]*m")


def test_a_terminal_shows_colours_unless_no_color_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "CI", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    assert COLOUR.search(in_a_terminal("export", "--help"))
    assert not COLOUR.search(in_a_terminal("export", "--help", NO_COLOR="1"))


def test_a_file_or_pipe_has_no_escape_sequences(command: Command, tmp_path: Path) -> None:
    for arguments in (["--help"], ["plan", "--help"], ["status", str(tmp_path)], ["run", "--unknown"]):
        _, out, err = command(*arguments)
        assert "\x1b" not in out + err


# --- shell completion, by the variables with which the script of the shell asks for it


def complete(command: Command, monkeypatch: pytest.MonkeyPatch, line: str) -> list[str]:
    monkeypatch.setenv("_REINFORCE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    status, out, _ = command()
    assert status == 0
    return out.split()


def test_bash_completes_commands_and_options(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert complete(command, monkeypatch, "reinforce pl") == ["plan"]
    models = ["onnx", "coreml", "litert", "executorch", "transformers"]
    exports = [*models, "datacompdr", "embeddings", "labels", "latency"]
    assert complete(command, monkeypatch, "reinforce export ") == exports
    assert complete(command, monkeypatch, "reinforce run my.yaml --ret") == ["--retry-quarantined"]
    assert complete(command, monkeypatch, "reinforce evaluate m --precision b") == ["bf16"]


CODE = """
import os, sys
from reinforce.cli import main
def run(*words, **variables):
    os.environ.update(variables)
    try:
        main(list(words))
    except SystemExit as ended:
        print(ended.code, sorted(HEAVY & {*sys.modules}), flush=True)
HEAVY = {"torch", "ray", "numpy", "pyarrow", "yaml", "fsspec", "transformers", "open_clip", "matplotlib"}
"""
HELP = """
run("--help")
run(_REINFORCE_COMPLETE="complete_bash", COMP_WORDS="reinforce run --", COMP_CWORD="2")
"""
FAULTS = """
HEAVY = {"torch", "open_clip"}
run("train", "configs/student-demo.yaml", "--set", "unknown=1")
run("finetune-captioner", "configs/finetune-demo.yaml", "--set", "unknown=1")
run("train", "configs/student-demo.yaml", "--set", "train.steps=80")
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CODE + code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )


def test_help_and_completion_import_no_heavy_library() -> None:
    printed = python(HELP).stdout
    assert "Usage: reinforce" in printed
    assert "--retry-quarantined" in printed
    assert printed.count("0 []\n") == 2


def test_errors_in_a_config_are_reported_before_models_are_imported() -> None:
    done = python(FAULTS)
    assert done.stderr.count("unknown: unknown key") == 2
    assert "for example with --set train.optimizer.warmup=8, or" in done.stderr
    assert done.stdout.splitlines() == ["2 []"] * 3
