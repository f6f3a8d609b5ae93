"""The import contracts of pyproject.toml hold, and each fails when it is broken on purpose."""

from __future__ import annotations

import ast
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("reinforce", "teachers", "schemas", "jobs", "benchmarks", "drills", "examples", "reinforce_docs")
#: A contract, a file, and an import in it that breaks the contract.
BROKEN = [
    ("Programs use reinforce, reinforce uses teachers", "teachers/weights.py", "reinforce.errors"),
    ("Inside reinforce imports point one way", "reinforce/source/samples.py", "reinforce.dataset.layers"),
    ("The engine: messages, plan, worker", "reinforce/engine/plan/plan.py", "reinforce.engine.driver.worker_pool"),
    (
        "The driver acts, its policy decides",
        "reinforce/engine/driver/faults.py",
        "reinforce.engine.driver.worker_pool",
    ),
    ("Policy is pure", "reinforce/engine/driver/faults.py", "ray"),
    ("Datasets: files, manifest", "reinforce/dataset/index.py", "reinforce.dataset.claims"),
    ("Sources: bytes, samples, formats", "reinforce/source/urls.py", "reinforce.source.formats.base"),
    ("Teachers: families above", "teachers/runtime/accelerator.py", "teachers.coca.decoder"),
    ("Training imports neither the engine", "reinforce/training/task.py", "reinforce.dataset.store"),
    ("What learns, and what judges it", "reinforce/student/train.py", "reinforce.engine.plan.plan"),
]
#: An import that with one the other way breaks the contract "No circles".
CIRCLE = ("reinforce_docs/tables.py", "reinforce_docs.variables")
#: Contracts that name every module of a folder, and a folder of each.
EXHAUSTIVE = {
    "Inside reinforce imports point one way": "reinforce",
    "The engine: messages, plan, worker": "reinforce/engine",
    "The driver acts, its policy decides": "reinforce/engine/driver",
    "Datasets: files, manifest": "reinforce/dataset",
    "Sources: bytes, samples, formats": "reinforce/source",
    "Teachers: families above": "teachers",
}


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "from importlinter.cli import lint_imports_command as run; run(['--no-cache', '--no-logo'])"
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def sections(output: str) -> dict[str, str]:
    """What is printed about each broken contract, by its name."""
    found: dict[str, str] = {}
    lines = output.partition("Broken contracts")[2].splitlines()
    for before, line in itertools.pairwise(lines):
        if before and line == "-" * len(before):
            name, found[before] = before, ""
        elif found:
            found[name] += f"{line}\n"
    return found


def test_the_contracts_hold() -> None:
    done = check(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(BROKEN) + 1} kept, 0 broken" in done.stdout


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What is printed about each contract where all are broken, and folders have a module that no contract names."""
    folder = tmp_path_factory.mktemp("imports")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for file, module in [*((file, module) for _, file, module in BROKEN), CIRCLE]:
        package, _, name = module.rpartition(".")
        code = f"from {package} import {name}" if package else f"import {name}"
        with (folder / file).open("a") as changed:
            changed.write(f"\ndef _broken() -> None:\n    {code}\n")
    for place in EXHAUSTIVE.values():
        (folder / place / "unplaced.py").touch()
    done = check(folder)
    assert done.returncode == 1, done.stdout + done.stderr
    return sections(done.stdout)


@pytest.mark.parametrize(("contract", "file", "module"), BROKEN)
def test_an_import_that_breaks_a_contract_is_reported(
    broken: dict[str, str], contract: str, file: str, module: str
) -> None:
    section = next(text for name, text in broken.items() if name.startswith(contract))
    importer = file.removesuffix(".py").replace("/", ".")
    assert importer in section
    assert module in section


def test_a_circle_of_imports_is_reported(broken: dict[str, str]) -> None:
    assert "No cycles are allowed in reinforce_docs" in broken["No circles"]


@pytest.mark.parametrize(("contract", "folder"), EXHAUSTIVE.items())
def test_a_module_without_a_place_is_reported(broken: dict[str, str], contract: str, folder: str) -> None:
    section = next(text for name, text in broken.items() if name.startswith(contract))
    assert f"{folder.replace('/', '.')}.unplaced" in section


def test_packages_of_extras_are_imported_only_where_they_are_used() -> None:
    """A core install has none of them; `make wheel-check` runs and trains with it."""
    extras = {"matplotlib", "tensorboard", "sacrebleu", "duckdb", "faiss", "onnx", "onnxruntime", "openai"}
    found = []
    for path in itertools.chain.from_iterable((ROOT / name).rglob("*.py") for name in ("reinforce", "teachers")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [(path.name, name) for name in names if name.partition(".")[0] in extras]
    assert found == []


def test_reading_a_data_set_imports_at_most_50_modules_and_no_family_of_models() -> None:
    code = "import sys, reinforce; reinforce.open; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = [name for name in done.stdout.split() if name.split(".")[0] in ("reinforce", "teachers", "schemas")]
    assert len(found) <= 50, found
    families = ("reinforce.config", "teachers.spec", "teachers.open_clip", "teachers.timm", "teachers.transformers")
    assert not [name for name in found if name.startswith(families)]
