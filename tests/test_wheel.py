"""The wheel: what it contains, and how large it is. `make wheel-check` installs it into an empty environment."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import reinforce
from tests.helpers.pages import ROOT

PACKAGES = ("reinforce", "schemas", "teachers")
#: Example configs that need no file of the repository.
CONFIGS = {
    *("datacompdr12m", "datacompdr1b", "dfn5b", "dfndr12m", "dfndr12m-bf16", "dfndr2b", "finetune-coco38k"),
    *("finetune-docci", "mobileclip2-s0", "adapt-mobileclip2-s0", "adapt-mobileclip2-s2"),
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built in a copy, because setuptools adds what an earlier build left in the folder ``build``."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors", "tokenizer.json")
    for name in (*PACKAGES, "benchmarks", "configs", "examples", "jobs", "reinforce_docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    built = subprocess.run([sys.executable, "-c", build], cwd=folder, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("dist/*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_has_every_module_and_nothing_of_the_repository_besides(wheel: zipfile.ZipFile) -> None:
    modules = {
        str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()
    }
    modules = {module for module in modules if "__pycache__" not in module}
    information = {name for name in wheel.namelist() if ".dist-info/" in name or ".data/" in name}
    assert {*wheel.namelist()} - information == modules
    assert {*(f"{package}/py.typed" for package in PACKAGES), "schemas/json/run.json"} <= modules


def test_the_wheel_has_the_configs_that_work_without_the_repository(wheel: zipfile.ZipFile) -> None:
    data = [name for name in wheel.namelist() if ".data/" in name]
    assert {Path(name).stem for name in data} == CONFIGS
    for name in data:
        assert "/data/share/dataset-reinforcement/configs/" in name
        for line in wheel.read(name).decode().splitlines():
            assert "local-dir:configs/" not in line.partition("#")[0], f"{name}: {line}"


def test_the_wheel_is_small(wheel: zipfile.ZipFile) -> None:
    assert sum(entry.compress_size for entry in wheel.infolist()) < 1_500_000


def test_the_metadata_names_versions_licence_and_command(wheel: zipfile.ZipFile) -> None:
    files = {Path(name).name: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    metadata = files["METADATA"].splitlines()
    assert {"License-Expression: Apache-2.0", "Requires-Python: >=3.10", "Classifier: Typing :: Typed"} <= {*metadata}
    assert {f"Classifier: Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)} <= {*metadata}
    assert "reinforce = reinforce.cli:main" in files["entry_points.txt"]
    assert "Apache License" in files["LICENSE"]


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == reinforce.__version__
    released = f"## [{reinforce.__version__}] - {citation['date-released']}"
    assert released in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for paper in citation["references"]:
        assert paper["url"] in (ROOT / "docs/README.md").read_text(encoding="utf-8")
