"""Commands of the command line, run in the process of the test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from reinforce.cli import main
from tests.helpers.pages import ROOT

#: Words of a command -> its exit status, standard output and standard error.
Command = Callable[..., tuple[int, str, str]]


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
    return out


def json_of_process(code: str, *arguments: object, **environment: str) -> Any:
    """What Python prints as JSON in its last line when it runs ``code``, which must end without an error."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=1080, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])
