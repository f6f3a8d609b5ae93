"""Nothing from data is executed, and no file in the working folder is imported in place of a package.

It may be the folder of somebody's dataset. Ruff's rules (S) forbid eval, shells and yaml.load; these tests cover the
rest.
"""

from __future__ import annotations

import ast
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from teachers.weights import as_safetensors
from tests.helpers.data import config_of
from tests.helpers.reinforced import small_dataset

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for folder in ("reinforce", "teachers", "schemas", "jobs", "examples")
    for path in (ROOT / folder).rglob("*.py")
]
#: Functions that execute data, or unpack it to paths from the data.
NEVER = {"pickle.load", "pickle.loads", "joblib.load", "marshal.loads", "shelve.open", "eval", "exec", "os.system"}
NEVER |= {"yaml.load", "tar.extract", "tar.extractall", "archive.extractall"}
KEYWORDS = ("shell", "allow_pickle", "trust_remote_code", "weights_only")
#: Teachers, whose own code runs where the config says so.
TRUSTING = ROOT / "teachers" / "transformers" / "teacher.py"
#: Messages between a worker and its own decode processes, over a socket without a name.
OWN_MESSAGES = {
    ("worker/decode.py", "pickle.loads"),
    ("processes/parallel.py", "pickle.loads"),
}


def calls(path: Path) -> Iterator[tuple[str, dict[str | None, str]]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            given = [keyword for keyword in node.keywords if keyword.arg in KEYWORDS]
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in given}


def test_no_function_that_executes_or_unpacks_data_is_called() -> None:
    assert len(SOURCES) > 50
    for path in SOURCES:
        for name, keywords in calls(path):
            assert name not in NEVER or ("/".join(path.parts[-2:]), name) in OWN_MESSAGES, f"{path}: {name}"
            assert keywords.get("shell") != "True", path
            assert keywords.get("allow_pickle") in (None, "False"), path
            given = (None, "False", "spec.trust_remote_code")[: 3 if path == TRUSTING else 2]  # of the user's config
            assert keywords.get("trust_remote_code") in given, path
            if name == "torch.load":
                assert keywords.get("weights_only") == "True", path
            if name.endswith("from_pretrained") and "Auto" in name:
                assert keywords.get("trust_remote_code"), f"{path}: {name}"


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_checkpoint_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REINFORCE_CACHE", str(tmp_path / "cache"))
    torch.save({"weight": torch.zeros(2), "extra": Bomb(tmp_path / "ran")}, tmp_path / "a.pt")
    (tmp_path / "b.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    np.save(tmp_path / "c.npy", np.array([Bomb(tmp_path / "ran")], object), allow_pickle=True)
    (tmp_path / "c.npy").rename(tmp_path / "c.ckpt")
    for name in ("a.pt", "b.bin", "c.ckpt"):
        with pytest.raises(ValueError, match="code in checkpoints is not run"):
            as_safetensors(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    assert not [*(tmp_path / "cache").rglob("*.safetensors")]
    pickle.loads((tmp_path / "b.bin").read_bytes())
    assert (tmp_path / "ran").exists(), "the bomb works"


REINFORCE = str(Path(sys.executable).with_name("reinforce"))
#: Names of packages that some command imports.
PACKAGES = ("PIL", "fsspec", "numpy", "pyarrow", "pydantic", "ray", "torch", "yaml", "our_teachers")


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


def test_a_command_about_a_dataset_and_the_workers_of_a_run_run_no_file_of_it(
    dataset: Path, shards: Callable[..., str], tmp_path: Path
) -> None:
    for command in ([REINFORCE], [sys.executable, "-m", "reinforce"]):
        done = run(dataset, *command, "status", ".")
        assert (done.returncode, ran(dataset)) == (0, []), done.stderr
    # The workers of a run import packages first.
    config = config_of(shards(2, folder="more"), tmp_path / "new", captioners={})
    config["teachers"] = {"mine": {"class": "our_lab:Mine"}}
    (dataset / "our_lab.py").write_text(
        "from tests.helpers.models import ColorTeacher\n\n\nclass Mine(ColorTeacher): ...\n"
    )
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    program = tmp_path / "bin" / "reinforce"
    program.parent.mkdir()
    program.write_text("from reinforce.cli import main\n\nmain()\n")
    done = run(dataset, sys.executable, str(program), "run", f"{tmp_path}/my.yaml")
    assert (done.returncode, ran(dataset)) == (0, []), done.stderr
    assert (tmp_path / "new" / "embeddings" / "mine").is_dir()
