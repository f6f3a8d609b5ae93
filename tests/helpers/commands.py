"""Commands of the command line, run in the process of the test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reinforce.cli import main
from tests.helpers.pages import ROOT

#: Words of a command -> its exit status, standard output and standard error.
Command = Callable[..., tuple[int, str, str]]
#: Words of a command -> what it prints: on standard output, or, if it is refused with status 2, on standard error.
Printed = Callable[..., str]


def exit_status(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    code = ended.value.code
    return code if isinstance(code, int) else int(code is not None)


def run_command(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    return exit_status(*words), *capfd.readouterr()


def printed_by(capfd: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    """What a command prints that ends with this ``status``."""
    code, out, err = run_command(capfd, *words)
    assert code == status, err
    return err if status == 2 else out


def output_of(*command: object, cwd: Path = ROOT, given: str | None = None, **environment: str) -> str:
    """What a program prints that gets ``given`` and must end without an error."""
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=os.environ | environment, input=given, capture_output=True, text=True,
        timeout=1080, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def json_of_process(code: str, *arguments: object, **environment: str) -> Any:
    """What Python prints as JSON in its last line when it runs ``code``, which must end without an error."""
    return json.loads(output_of(sys.executable, "-c", code, *arguments, **environment).splitlines()[-1])
