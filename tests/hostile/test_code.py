"""Nothing from data is executed. Ruff's rules (S) forbid eval, shells and yaml.load; these tests cover the rest."""

from __future__ import annotations

import ast
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from teachers.weights import as_safetensors

ROOT = Path(__file__).parents[2]
SOURCES = [path for folder in ("reinforce", "teachers", "schemas", "jobs") for path in (ROOT / folder).rglob("*.py")]
#: Functions that execute data, or unpack it to paths from the data.
NEVER = {"pickle.load", "pickle.loads", "joblib.load", "marshal.loads", "shelve.open", "eval", "exec", "os.system"}
NEVER |= {"yaml.load", "tar.extract", "tar.extractall", "archive.extractall"}
#: Messages between a worker and its own decode processes, over a socket without a name.
OWN_MESSAGES = {("decode/handle.py", "pickle.loads"), ("decode/process.py", "pickle.loads")}


def calls(path: Path) -> Iterator[tuple[str, dict[str | None, str]]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def test_no_function_that_executes_or_unpacks_data_is_called() -> None:
    assert len(SOURCES) > 50
    for path in SOURCES:
        for name, keywords in calls(path):
            assert name not in NEVER or ("/".join(path.parts[-2:]), name) in OWN_MESSAGES, f"{path}: {name}"
            assert keywords.get("shell") != "True", path
            assert keywords.get("allow_pickle") in (None, "False"), path
            assert keywords.get("trust_remote_code") in (None, "False"), path
            if name == "torch.load":
                assert keywords.get("weights_only") == "True", path
            if name.endswith("from_pretrained") and "Auto" in name:
                assert keywords.get("trust_remote_code") == "False", f"{path}: {name}"


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
    pickle.loads((tmp_path / "b.bin").read_bytes())
    assert (tmp_path / "ran").exists(), "the bomb works"
