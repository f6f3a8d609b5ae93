"""Files in the working folder are not imported in place of packages: it may be the folder of somebody's dataset."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.helpers.data import config_of
from tests.helpers.reinforced import small_dataset

REINFORCE = str(Path(sys.executable).with_name("reinforce"))
#: Names of packages that some command imports.
PACKAGES = ("PIL", "fsspec", "numpy", "pyarrow", "pydantic", "ray", "torch", "yaml", "our_teachers")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset with files that have the names of packages, and write a file when they are imported."""
    folder = Path(small_dataset(tmp_path, (3,)))
    for package in PACKAGES:
        code = "import pathlib\npathlib.Path(__file__).with_suffix('.ran').touch()\n"
        (folder / f"{package}.py").write_text(code)
    return folder


def ran(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.ran"))


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # for the classes of tests
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=1080, check=False, env=environment
    )


@pytest.mark.parametrize("program", [[REINFORCE], [sys.executable, "-m", "reinforce"]], ids=["script", "module"])
def test_a_command_about_a_dataset_runs_no_file_of_it(dataset: Path, program: list[str]) -> None:
    done = run(dataset, *program, "status", ".")
    assert (done.returncode, ran(dataset)) == (0, []), done.stderr


def test_the_workers_of_a_run_import_packages_first(dataset: Path, shards: Callable[..., str], tmp_path: Path) -> None:
    config = config_of(shards(2, folder="more"), tmp_path / "new", captioners={})
    config["teachers"] = {"mine": {"class": "our_lab:Mine"}}
    (dataset / "our_lab.py").write_text(
        "from tests.helpers.models import ColorTeacher\n\n\nclass Mine(ColorTeacher): ...\n"
    )
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    program = tmp_path / "bin" / "reinforce"
    program.parent.mkdir()
    program.write_text("from tests.helpers import lean_ray\n\nlean_ray.run_command()\n")
    done = run(dataset, sys.executable, str(program), "run", f"{tmp_path}/my.yaml")
    assert (done.returncode, ran(dataset)) == (0, []), done.stderr
    assert (tmp_path / "new" / "embeddings" / "mine").is_dir()
