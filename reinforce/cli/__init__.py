"""The command line: the program ``reinforce``, its commands, and how errors end them."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

import reinforce
from reinforce.cli import adapting, dataset, export, run, training
from reinforce.cli.common import examples
from reinforce.errors import UserError
from reinforce.processes.cores import let_waiting_threads_sleep
from reinforce.processes.signals import Terminated, ends_after_sigterm, terminated_by_exception
from reinforce.terminal import escape
from teachers.redact import redact

#: Exit status of an error that is neither the user's nor foreseen.
UNEXPECTED = 1
_DEBUG: ContextVar[bool] = ContextVar("debug", default=False)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Multi-modal dataset reinforcement: store augmentations, teachers' embeddings and synthetic captions next to "
    "image-text pairs, and train small CLIP students from them.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"reinforce {reinforce.__version__}")
        raise typer.Exit


@app.callback(**examples("reinforce run configs/demo.yaml", "reinforce --install-completion"))
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version, and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="REINFORCE_DEBUG", help="Show the traceback of an error.")
    ] = False,
) -> None:
    _DEBUG.set(debug)


#: Each command with its examples, in the order of the help.
_COMMANDS: dict[Callable[..., None], tuple[str, ...]] = {
    run.run: (
        "reinforce run configs/demo.yaml",
        "reinforce run configs/demo.yaml --set workers.cpus=2",
        "reinforce run configs/demo.yaml --retry-quarantined",
    ),
    run.plan: (
        "reinforce plan configs/demo.yaml",
        "reinforce plan configs/demo.yaml --rate 400 --price 3 --hours 24",
        "reinforce plan configs/demo.yaml --uses",
    ),
    run.check: (
        "reinforce check configs/demo.yaml",
        "reinforce check our_lab.teachers:Radiology --options '{\"size\": 336}'",
    ),
    run.init: (
        "reinforce init demo/shards",
        "reinforce init hf://datasets/ORG/NAME",
        "reinforce init photos/",
        "reinforce init --schema run",
    ),
    dataset.status: (
        "reinforce status demo/dataset",
        "reinforce status demo/dataset --watch",
        "reinforce status demo/dataset --reasons",
        "reinforce status --grafana grafana/dashboards",
    ),
    dataset.validate: (
        "reinforce validate demo/dataset",
        "reinforce validate demo/dataset --quick --sample 100",
        "reinforce validate demo/dataset --sources demo/shards --repair",
        "reinforce validate demo/dataset --recompute 32 --config configs/demo.yaml",
    ),
    dataset.drop: (
        "reinforce drop demo/dataset 'embeddings/conv-48/*'",
        "reinforce drop demo/dataset 'embeddings/conv-48/*' --yes",
    ),
    dataset.convert: ("reinforce convert demo/dataset conv-48 conv-48-first32 --codec first32",),
    dataset.inspect: (
        "reinforce inspect demo/dataset demo/report",
        "reinforce inspect demo/dataset demo/report --teachers conv-64 --limit 500 --seed 1",
    ),
    dataset.select: ("reinforce select configs/select-demo.yaml",),
    training.train: (
        "reinforce train configs/student-demo.yaml",
        "reinforce train configs/student-demo.yaml --set output=demo/students/second",
    ),
    training.finetune_captioner: ("reinforce finetune-captioner configs/finetune-demo.yaml",),
    training.tune: ("reinforce tune configs/tune-demo.yaml", "reinforce tune configs/tune-demo.yaml --screen-only"),
    training.evaluate: (
        "reinforce evaluate demo/students/distilled --retrieval demo=demo/dataset",
        "reinforce evaluate demo/students/plain --config configs/student-demo.yaml",
        "reinforce evaluate MobileCLIP2-S0,dfndr2b --zero-shot pets=pets/",
        "reinforce evaluate --suite datacomp --data evalsets --fetch --dry-run",
    ),
    adapting.adapt: (
        "reinforce adapt photos/ adapted --model MobileCLIP2-S0,dfndr2b",
        "reinforce adapt demo/tests/unseen-style new --config configs/adapt-demo.yaml",
    ),
    adapting.interpolate: (
        "reinforce interpolate demo/students/plain demo/students/distilled mixed",
        "reinforce interpolate --soup demo/students/* soup --zero-shot pets=pets/",
    ),
}

for command, commands in _COMMANDS.items():
    app.command(**examples(*commands))(command)
app.add_typer(export.export, name="export")
app.add_typer(export.publish, name="publish")


def main(arguments: list[str] | None = None) -> None:
    """Run a command. An error prints one message without a traceback, and exits with the status of the error."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # hides warnings of intended settings
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what MPS lacks runs on the CPU, and torch warns once
    let_waiting_threads_sleep()
    _DEBUG.set(False)
    try:
        with ends_after_sigterm(program=arguments is None), terminated_by_exception():
            _program()(args=arguments, prog_name="reinforce")
    except Terminated as stopped:  # of commands that do not handle it themselves
        _fail("stopped by SIGTERM", stopped.status)
    except UserError as error:
        _fail(f"error: {error}", error.exit_status)
    except Exception as error:
        _fail(f"error: {_describe(error)}", UNEXPECTED)


@cache
def _program() -> Any:
    """The command that typer makes of ``app``. With all options it takes 80 ms, which a program may call often."""
    return typer.main.get_command(app)


def _fail(message: str, status: int) -> None:
    """Print an error, with its traceback if it is wanted, and exit."""
    if _DEBUG.get():
        typer.echo(escape(redact(traceback.format_exc())), err=True)
    typer.echo(escape(redact(message)), err=True)
    raise SystemExit(status) from None


def _describe(error: Exception) -> str:
    """Describe an unexpected error in one line: what it is, where it was raised, and what to do."""
    frames = traceback.extract_tb(error.__traceback__)
    root = Path(__file__).parents[2]
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(root)] or [*frames]
    place = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "unknown place"
    text = " ".join(f"{type(error).__name__}: {error}".split())
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "COMMAND")
    return (
        f"unexpected {text} ({place}). `reinforce --debug {command} ...` shows the traceback. If the program is at "
        f"fault and not a model or class of yours, report it with the traceback{_tracker()}."
    )


def _tracker() -> str:
    """Where to report, if the installed package has an address for it."""
    try:
        urls = metadata.metadata("dataset-reinforcement").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:  # the checkout of a job is not installed
        urls = []
    found = dict(entry.split(", ", 1) for entry in urls)
    return f" at {found['Issues']}" if "Issues" in found else " on the issue page of the repository"
