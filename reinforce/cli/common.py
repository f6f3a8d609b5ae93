"""Shared parts of commands: options, examples, and JSON on standard output."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar

import typer
from rich.markup import escape as literal

from reinforce.terminal import escape, print_table
from teachers.redact import redact

if TYPE_CHECKING:
    from rich.console import RenderableType

T = TypeVar("T")

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the config, repeatable: --set workers.cpus=4"),
]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster to use: 'auto' or HOST:PORT. Default: RAY_ADDRESS, otherwise this machine."),
]
JsonFile = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Also write the results to this file; -: only to standard output."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object; everything else goes to standard error.")]
DatasetUrl = Annotated[str, typer.Argument(metavar="DATASET", help="Folder or fsspec URI of a reinforced dataset.")]
ViewName = Annotated[
    str | None, typer.Option(metavar="NAME", help="Only the samples that this view of `reinforce select` keeps.")
]
ImagesFrom = Annotated[
    list[str] | None,
    typer.Option(
        metavar="URL", help="Folder of tars that images may be read from, if stored by reference; repeatable."
    ),
]
Pretrained = Annotated[
    str | None, typer.Option(metavar="TAG", help="Tag or checkpoint of models that are given by NAME alone.")
]
SetsConfig = Annotated[Path | None, typer.Option(help="YAML config whose `evaluate` section defines sets.")]
ZeroShot = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=URL", help="Images with classes: a folder with a folder per class, or shards."),
]
Retrieval = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=URL", help="Images with captions: shards, or a reinforced dataset."),
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Images of each set to use; of two parts, of `test`. Default: all.")
]
NoRay = Annotated[bool, typer.Option("--no-ray", help="Work in this process, one shard after the other.")]

#: FILE of --json for standard output.
STDOUT = "-"
_EXAMPLE = "$ "


def config_argument(example: str) -> Any:
    """The argument CONFIG of a command, whose help names a config of ``configs/``."""
    return typer.Argument(metavar="CONFIG", help=f"YAML config, for example configs/{example}.")


def split_names(option: str | None) -> list[str] | None:
    """The names of an option, which commas separate; None without it."""
    return None if option is None else [name for name in map(str.strip, option.split(",")) if name]


def examples(*commands: str) -> dict[str, Any]:
    """Options of ``app.command`` that add examples to the end of a command's help.

    Each is a command line that runs as it is, after `make demo`.
    """
    lines = [literal(_EXAMPLE + command) for command in commands]
    return {"epilog": "\n\n".join([f"Example{'s' * (len(lines) > 1)}:", *lines])}


def print_lines(lines: Iterable[str]) -> None:
    """Print lines that contain texts of data."""
    for line in lines:
        typer.echo(escape(line))


def print_json(value: Any, indent: int | None = 2) -> None:
    """Print one JSON object on standard output: without secrets in URLs, with null for numbers that are not finite.

    ``indent`` None gives a single line.
    """
    typer.echo(json.dumps(_plain(value), indent=indent))


@contextlib.contextmanager
def only_json(active: bool = True) -> Iterator[Callable[[Any], None]]:
    """Send what is written to standard output to standard error, also by child processes, if ``active``.

    Yields a function that prints JSON, which can be called inside, to the standard output as it was before.
    """
    if not active:
        yield print_json
        return
    printed: list[Any] = []
    with _stdout_to_stderr():
        yield printed.append
    for value in printed:
        print_json(value)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Mapping):
        return {redact(str(key)): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int)) else redact(str(value))


class ShownReport(Protocol):
    """Results as a table with lines below it, and as JSON."""

    def table(self) -> RenderableType: ...

    def lines(self) -> Sequence[str]: ...

    def as_json(self) -> dict[str, Any]: ...


def show_report(report: ShownReport, file: str | None, print_json: Callable[[Any], None]) -> None:
    """Show a report on the terminal, and write it to the file of --json. Raises UserError."""
    from reinforce.storage import write_json

    if file == STDOUT:
        print_json(report.as_json())
        return
    print_table(report.table())
    for line in report.lines():
        typer.echo(line)
    if file is not None:
        write_json(report.as_json(), file)


def run_training(work: Callable[[], T]) -> T:
    """Train, with the log on the terminal; if it is stopped, exit with the status of the signal."""
    from reinforce.processes.signals import Stopped

    logging.basicConfig(format="%(message)s")
    logging.getLogger("reinforce").setLevel(logging.INFO)
    try:
        return work()
    except (Stopped, KeyboardInterrupt) as stopped:
        typer.echo("stopped; run the same command again to resume from the last checkpoint", err=True)
        raise typer.Exit(stopped.status if isinstance(stopped, Stopped) else 130) from None
