"""Commands that pages show: which of them tests run. The others are parsed, with the files that they name."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import typer

from benchmarks.gpu.__main__ import make_parser as gpu_options
from benchmarks.pipeline.__main__ import make_parser as benchmark_options
from examples.demo.__main__ import app as demo
from reinforce.cli import app
from tests.helpers.pages import ROOT

#: Buckets of the examples are folders of the workspace.
BUCKET = "s3://my-bucket/"

#: Commands that are run on the small dataset of the workspace.
RUN = [
    r"reinforce plan my\.yaml( --rate 400 --price 3 --hours 24)?",
    r"reinforce run my\.yaml( --set workers\.cpus=4| --retry-quarantined)?",
    r"reinforce status (my-data|demo/dataset)( --reasons| --watch| --json| -v)?",
    r"reinforce status --grafana grafana/dashboards",
    r"reinforce validate my-data( --quick| --repair)?( --sample 2000)?( --sources shards)?",
    r"reinforce check (my\.yaml|our_teachers:Tiny --options .*|our_scores:Sharpness)",
    r"reinforce inspect my-data my-report",
    r"reinforce export datacompdr my-data my-data-dr --teachers conv-64,tiny",
    r"reinforce export labels my-data my-labels --license cc-by-4\.0",
    r"reinforce export embeddings my-data my-vectors --teacher conv-64",
    r"reinforce publish card my-data --license cc-by-4\.0",
    r"reinforce train student\.yaml",
    r"reinforce evaluate runs/s0 --config student\.yaml",
    r"reinforce evaluate runs/s0 --retrieval flickr=flickr30k-test\.tar --json scores\.json",
    r"reinforce tune tune\.yaml --screen-only",
    r"reinforce init --schema run",
    r"reinforce init shards",
    r"reinforce select select\.yaml",
    r"reinforce (check|plan|run) photos\.yaml",
    r"reinforce validate photos-reinforced",
    r"reinforce inspect photos-reinforced photos-report",
]

#: Files that a command of the pages writes.
_WRITTEN = {"runs/tuning/student.yaml"}


@cache
def _command(app: typer.Typer) -> Any:
    """The command of a program, which takes 30 ms to make."""
    return typer.main.get_command(app)


def local(words: list[str]) -> list[str]:
    """A command with the buckets of the examples as folders of the workspace."""
    return [word.replace(BUCKET, "") for word in words]


def rule_of(words: list[str]) -> str | None:
    """The first rule of RUN that a command matches as a whole."""
    command = " ".join(local(words))
    return next((rule for rule in RUN if re.fullmatch(rule, command)), None)


def check(words: list[str]) -> None:
    """Parse a command without running it: the program, every option, and every file that it names.

    Call it in the workspace. Raises AssertionError, or what the program's own parser raises.
    """
    program, *rest = local(words)
    checks = {"reinforce": _reinforce, "make": _make, "ray": _ray, "torchrun": _torchrun, "pip": _pip}
    if program == "python":
        _python(rest)
    elif program in checks:
        checks[program](rest)
    elif program == "export":
        assert re.fullmatch(r"[A-Z_]+=\S+", rest[0]), rest
    else:
        assert os.access(ROOT / program, os.X_OK), f"{program} is no program of the repository"
    for word in rest:
        if re.fullmatch(r"[\w./-]+\.(yaml|py)", word) and word not in _WRITTEN:
            assert Path(word).exists(), f"{shlex.join(words)} names {word}, which does not exist"


def check_names(program: str, words: list[str]) -> None:
    """Check that a command exists that is named without all of its arguments, and its options."""
    if program == "make":
        _make([word for word in words if word.islower()])
        return
    if program == "python":
        _python(words)
        return
    command: Any = _command(app)
    if words and words[0].startswith("--"):
        _reinforce(words[:1])
        words = words[1:]
    while hasattr(command, "commands") and words:
        assert words[0] in command.commands, f"reinforce has no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    options = {option for parameter in command.params for option in parameter.opts}
    for word in words:
        assert not word.startswith("--") or word in options, f"reinforce {command.name} has no option {word}"


def _parse(command: Any, words: list[str]) -> None:
    """Parse with click or typer, down to the last subcommand."""
    while hasattr(command, "commands"):
        assert words, f"{command.name} needs a subcommand"
        assert words[0] in command.commands, f"{command.name} has no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, list(words))


def _reinforce(words: list[str]) -> None:
    command: Any = _command(app)
    options = {"--help", *(option for parameter in command.params for option in parameter.opts)}
    while words and words[0] in options:  # such as --version, which needs no command
        words = words[1:]
        if not words:
            return
    _parse(command, words)


def _make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for word in words:
        assert word in targets or re.fullmatch(r"[A-Z]+=\S+", word), f"make has no target {word}"


def _ray(words: list[str]) -> None:
    from ray.scripts.scripts import cli

    own, _, entry = " ".join(words).partition(" -- ")
    _parse(cli, own.split() + (["--", *entry.split()] if entry else []))
    if entry:
        check(entry.split())


def _torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(words)
    assert (parsed.module, parsed.training_script) == (True, "reinforce")
    _reinforce(parsed.training_script_args)


def _pip(words: list[str]) -> None:
    assert words[0] == "install"
    extras = re.search(r"optional-dependencies\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    for name in re.findall(r"\.\[(\w+)\]", " ".join(words)):
        assert re.search(rf"^{name} = ", extras[1], re.MULTILINE), f"there is no extra {name}"


def _python(words: list[str]) -> None:
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]) is not None, f"there is no module {words[1]}"
        if words[1] == "examples.demo" and len(words) > 2:
            _parse(_command(demo), words[2:])
        if words[1] == "benchmarks.pipeline":
            benchmark_options().parse_args(words[2:])
        if words[1] == "benchmarks.gpu":
            gpu_options().parse_args(words[2:])
        return
    job, *rest = words
    command = re.search(r'run\("([a-z-]+)"', (ROOT / job).read_text(encoding="utf-8"))
    assert command is not None, f"{job} runs no command"
    assert rest[0] == "--config", f"{job} needs --config"
    _reinforce([command[1], *rest[1:]])
