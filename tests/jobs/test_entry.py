"""Jobs run one command of ``reinforce`` with their own arguments."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import yaml

from jobs.entry import run
from tests.helpers.data import members_of, write_tar

JOBS = sorted(
    path for path in (Path(__file__).parents[2] / "jobs").glob("*.py") if path.name not in ("__init__.py", "entry.py")
)


def test_the_config_and_other_arguments_go_to_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", members_of(shard, 3))
    config = {"source": str(tmp_path / "0.tar"), "output": str(tmp_path / "out")}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
    options = ["--set", f"source={tmp_path}/*.tar"]
    monkeypatch.setattr(sys, "argv", ["job.py", *options, "--config", str(tmp_path / "job.yaml")])
    with pytest.raises(SystemExit) as ended:
        run("plan", "A job.", "configs/demo.yaml")
    assert ended.value.code in (0, None)
    assert "2 shards" in capsys.readouterr().out


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_the_help_of_a_job_names_its_command_and_an_existing_config(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"python jobs/{path.name} --config configs/" in text
    example = text.partition("--config configs/")[2].split()[0]
    assert (path.parents[1] / "configs" / example).is_file()


def test_a_job_without_config_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["job.py"])
    with pytest.raises(SystemExit) as ended:
        run("plan", "A job.", "configs/demo.yaml")
    assert ended.value.code == 2
    assert "--config" in capsys.readouterr().err
