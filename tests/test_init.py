"""The package's own example and names."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import reinforce
from tests.helpers.data import config_of
from tests.helpers.reinforced import reinforce_here

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
TEACHER = "tests.helpers.models:ColorTeacher"


def test_the_example_of_the_package_runs(
    shards: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_of(shards(3, 2), "demo/dataset")
    config["teachers"] = {"conv-64": {"class": TEACHER}, "conv-48": {"class": TEACHER, "options": {"seed": 1}}}
    config["captioners"] = {"coca": {"class": "tests.helpers.models:SeedCaptioner", "captions": 2}}
    reinforce_here(config)
    example = doctest.DocTestParser().get_doctest(reinforce.__doc__ or "", {}, "reinforce", None, None)
    result = doctest.DocTestRunner().run(example, clear_globs=False)
    assert (result.failed, result.attempted) == (0, 3)
    found = example.globs
    assert found["image"].size == (24, 24)
    assert [target.shape for target in found["targets"]] == [(8,), (8,)]
    assert found["captions"][0] == "thing 1 of shard 1"
    assert len(found["captions"]) == 3


def test_every_public_name_exists_and_is_listed_before_it_is_imported() -> None:
    assert all(getattr(reinforce, name).__doc__ for name in reinforce.__all__)
    assert {*reinforce.__all__, "__version__", "__doc__"} <= {*dir(reinforce)}
    assert [name for name in dir(reinforce) if not name.startswith("_")] == sorted(reinforce.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'missing'"):
        reinforce.missing  # noqa: B018


def test_the_version_is_that_of_the_code_without_an_installation() -> None:
    code = "import reinforce, sys; print(reinforce.__version__, reinforce.__file__)"
    result = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    version, path = result.stdout.split()
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert Path(path) == ROOT / "reinforce" / "__init__.py"
    assert 'version = { attr = "reinforce.__version__" }' in PYPROJECT


def test_the_name_of_another_distribution_is_never_installed() -> None:
    distribution = re.search(r'^name = "(.+?)"', PYPROJECT, re.MULTILINE)
    assert distribution is not None
    assert distribution[1] == "dataset-reinforcement", "`reinforce` on PyPI is a package of somebody else"
    texts = [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("docs/*.md"), *ROOT.glob("reinforce/**/*.py")]
    named = re.compile(r"(?<![\w-])reinforce\\*\[|\binstall '?reinforce")
    assert [str(path) for path in texts if named.search(path.read_text(encoding="utf-8"))] == []
