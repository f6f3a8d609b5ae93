"""The commands and options of the command line as text, which tests/command_line.txt holds.

``python -m tests.helpers.command_line`` writes the file again.
"""

from __future__ import annotations

import inspect
import os
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from reinforce.cli import app
from tests.helpers.pages import ROOT

FILE = ROOT / "tests/command_line.txt"
RENEW = "python -m tests.helpers.command_line"
_COMPLETION = ("install_completion", "show_completion")  # typer's own, which differ between its versions


def describe() -> str:
    """One line for each command, argument and option, with its type and default."""
    return "\n".join(_lines("reinforce", typer.main.get_command(app))) + "\n"


def _lines(name: str, command: Any) -> Iterator[str]:
    yield name
    callback = command.callback and inspect.unwrap(command.callback)
    for parameter in command.params if callback else ():
        if parameter.name not in _COMPLETION:
            yield f"    {_parameter(parameter, callback)}"
    for child, inner in sorted(getattr(command, "commands", {}).items()):
        yield from _lines(f"{name} {child}", inner)


def _parameter(parameter: Any, function: Callable[..., Any]) -> str:
    """A parameter by the names that the parser has, and by the type and the default of the function's."""
    argument = parameter.param_type_name == "argument"
    names = parameter.metavar or parameter.name if argument else "/".join([*parameter.opts, *parameter.secondary_opts])
    found = inspect.signature(function, eval_str=True).parameters[parameter.name]
    default, (kind, info, *_) = found.default, typing.get_args(found.annotation)
    limits = [f"at least {info.min}"] if info.min is not None else []
    limits += [f"at most {info.max}"] if info.max is not None else []
    given = ["required"] if default is inspect.Parameter.empty else [f"default {default!r}"]
    return ", ".join([names, _type(kind), *limits, *given])


def _type(kind: Any) -> str:
    members = [member for member in typing.get_args(kind) if member is not type(None)]
    if type(None) in typing.get_args(kind) and len(members) == 1:
        return _type(members[0])
    return kind.__name__ if isinstance(kind, type) and not members else str(kind).replace("typing.", "")


def difference(found: str, recorded: str) -> str:
    """Lines that were removed and added, for a message."""
    old, new = recorded.splitlines(), found.splitlines()
    return os.linesep.join(
        [*(f"- {line}" for line in old if line not in new), *(f"+ {line}" for line in new if line not in old)]
    )


if __name__ == "__main__":
    Path(FILE).write_text(describe(), encoding="utf-8")
