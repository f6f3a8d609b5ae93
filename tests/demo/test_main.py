"""The commands of ``python -m reinforce.demo``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reinforce.demo.__main__ import app
from reinforce.errors import UserError
from tests.helpers.data import tree
from tests.helpers.demo import ROOT


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_commands_of_the_makefile_exist() -> None:
    commands = set(re.findall(r"reinforce\.demo ([\w-]+)", (ROOT / "Makefile").read_text()))
    assert commands == {"data", "teacher-data", "initial-models", "keep", "students", "compare"}
    for command in commands:
        assert "--help" in run(command, "--help")


def test_data_writes_shards_and_test_sets_of_equal_bytes(demo_folder: Path, tmp_path: Path) -> None:
    out, noisy, tests = (tmp_path / name for name in ("shards", "noisy-shards", "tests"))
    output = run("data", "--out", str(out), "--noisy", str(noisy), "--tests", str(tests))
    assert f"3 shards in {tmp_path}/shards" in output
    assert {path.name for path in (tmp_path / "tests").iterdir()} == {
        "classes.txt", "groups.json", "unseen-icons", "unseen-pictures", "unseen-style",
    }  # fmt: skip
    assert tree(tmp_path) == tree(demo_folder)


def test_compare_without_students_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"python -m reinforce\.demo students"):
        run("compare", str(tmp_path))
