"""Reference of the command line, from the commands themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_type_hints

from typer.main import get_command

from reinforce.cli import app
from reinforce_docs.keys import type_text
from reinforce_docs.tables import cell, code, table


def commands() -> Iterator[tuple[str, Any]]:
    """(name, command) of every command, such as ``export onnx``, in the order of ``reinforce --help``."""
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        yield from ((f"{name} {sub}", found) for sub, found in inner.items()) if inner else [(name, command)]


def commands_page() -> str:
    """The page of all commands."""
    parts = ["# Commands\n", "What `reinforce COMMAND --help` prints, for every command.\n"]
    for name, command in commands():
        arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
        options = [parameter for parameter in command.params if parameter.param_type_name != "argument"]
        usage = " ".join([f"reinforce {name}", *(_metavar(argument) for argument in arguments)])
        parts += [f"## {name}\n", f"```text\n{usage}{' [OPTIONS]' * bool(options)}\n```\n", plain_help(command.help)]
        for title, parameters in (("argument", arguments), ("option", options)):
            if parameters:
                rows = [
                    (code(_names(command, parameter)), code(_default(parameter)), cell(plain_help(parameter.help)))
                    for parameter in parameters
                ]
                parts.append(table((title, "default", "meaning"), rows))
    return "\n".join(parts)


def plain_help(text: str | None) -> str:
    """Help as Markdown: without the escapes of Rich's markup, and with its paragraphs."""
    lines = re.sub(r"\\+\[", "[", text or "").strip().splitlines()
    return "\n".join(line.strip() for line in lines) + "\n"


def _metavar(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _names(command: Any, parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return _metavar(parameter)
    names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    if parameter.is_flag:
        return names
    value = parameter.metavar or type_text(get_type_hints(command.callback)[parameter.name])
    return f"{names} {value.removesuffix(', or null').removeprefix('list of ')}"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    empty = value in (None, False, (), []) or "UNSET" in repr(value).upper()
    return "" if empty else str(value)
