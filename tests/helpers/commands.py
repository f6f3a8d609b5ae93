"""Commands of the command line, run in the process of the test."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from reinforce.cli import main

#: Words of a command -> its exit status, standard output and standard error.
Command = Callable[..., tuple[int, str, str]]


def run_command(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    code = ended.value.code
    return (code if isinstance(code, int) else 0), *capfd.readouterr()


def printed_by(capfd: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    """What a command prints that ends with this ``status``."""
    code, out, err = run_command(capfd, *words)
    assert code == status, err
    return out
