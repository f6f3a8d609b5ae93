"""The exit status of ``reinforce run`` is the status in summary.json, however the run ends.

Of a run that a signal stops, tests/integration/test_faults.py compares them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from reinforce.cli import main
from reinforce.engine.driver.driver import Driver
from tests.helpers.data import config_of, members_of, write_tar

pytestmark = pytest.mark.usefixtures("ray_session")


def run(folder: Path, config: dict[str, Any]) -> int:
    """Run the command; return its exit status."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    with pytest.raises(SystemExit) as ended:
        main(["run", str(path)])
    return int(ended.value.code or 0)


def summary(folder: Path) -> dict[str, Any]:
    """The summary.json of the only run."""
    [path] = (folder / "out" / "runs").glob("*/summary.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A good shard and one that does not exist."""
    write_tar(tmp_path / "source" / "0.tar", members_of(0, 3))
    return f"{tmp_path}/source/{{0..1}}.tar"


def test_a_finished_run_with_too_many_quarantined_shards(
    source: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_of(source, tmp_path / "out", failures={"allowed_share": 0.4})
    assert run(tmp_path, config) == 1
    assert summary(tmp_path)["status"] == 1
    [(reason, example)] = summary(tmp_path)["examples"].items()
    lines = capfd.readouterr().out.splitlines()
    assert f"  {reason}, for example {example}" in lines[-3:]
    assert reason == "shard_missing"
    assert run(tmp_path, config) == 1, "also when there is nothing left to do"


def test_a_fault_of_all_shards_stops_the_run_before_it_quarantines_the_rest(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "source" / "000.tar", members_of(0, 3))
    config = config_of(f"{tmp_path}/source/{{000..199}}.tar", tmp_path / "out", failures={"allowed_share": 0.05})
    assert run(tmp_path, config) == 1
    assert summary(tmp_path)["status"] == 1
    assert summary(tmp_path)["message"] in (err := capfd.readouterr().err)
    assert "stopped: 11 of 200 shards" in err
    assert "shard_missing: No such file or directory. Fix it and run with --retry-quarantined." in err
    assert len(list((tmp_path / "out" / "quarantine" / "samples").iterdir())) < 20


def test_a_model_with_a_wrong_output_shape_fails_before_the_first_shard(
    source: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    teachers = {"odd": {"class": "tests.helpers.models:WrongShapeTeacher"}}
    assert run(tmp_path, config_of(source, tmp_path / "out", teachers=teachers)) == 2
    assert summary(tmp_path)["status"] == 2
    for text in (summary(tmp_path)["message"], capfd.readouterr().err):
        assert "odd" in text
        assert "(3, 7)" in text
    assert not list(tmp_path.glob("out/samples/*"))


def test_a_run_that_a_defect_of_the_program_stops(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(Driver, "_handle_start", fail)
    assert run(tmp_path, config_of(source, tmp_path / "out")) == 1
    assert (summary(tmp_path)["status"], summary(tmp_path)["message"]) == (
        1, "stopped by an error: ZeroDivisionError: a defect",
    )  # fmt: skip
