"""Steps of an export on the screen."""

from __future__ import annotations

import os
import time

import pytest

from reinforce import terminal
from reinforce.shipping.targets import base


def test_seconds_of_a_step_are_printed_while_its_converter_is_silent(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "_LOG_SECONDS", 0.05)
    monkeypatch.setattr(base, "_REDRAW_SECONDS", 0.01)
    with base.step_screen() as screen:
        with base.step(screen, "image tower: conversion"), base.silenced():
            print("of the converter, in Python")
            os.write(1, b"of the converter, in C++")
            time.sleep(0.4)
        with pytest.raises(ValueError, match="no"), base.step(screen, "text tower: conversion"):
            raise ValueError("no")
    out, err = capfd.readouterr()
    lines = [line for line in out.splitlines() if line != "text tower: conversion"]
    assert len(lines) > 2, "the last one when it ended, others before"
    assert (set(lines), err) == ({"image tower: conversion: 0:00:00"}, "")
