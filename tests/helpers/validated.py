"""Runs of `reinforce validate` in the process of the test."""

from __future__ import annotations

import pytest

from reinforce.cli import main


def printed(url: str, status: int, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Validate a dataset, which must end with ``status``; return what is printed."""
    with pytest.raises(SystemExit, match=f"^{status}$"):
        main(["validate", url, *options])
    return capsys.readouterr().out
