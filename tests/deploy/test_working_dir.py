"""What `ray job submit --working-dir .` uploads from a checkout."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).parents[2]
LARGE = [
    ".venv/lib/python3/site-packages/torch/lib.so",
    ".git/objects/pack/a.pack",
    "demo/shards/000.tar",
    "data/000.tar",
    "checkpoints/step-1.pt",
    "wandb/run/log.txt",
    "outputs/samples/a.parquet",
    "mine/000.tar.gz",
    "mine/a.parquet",
]


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip(f"not a checkout of git: {listed.stderr.strip()}")
    return listed.stdout.splitlines()


def test_a_job_uploads_code_and_configs_and_nothing_large(tracked: list[str], tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in [*tracked, *LARGE, "mine/teachers.py", "mine/run.yaml"]:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).touch()
    for name in (".gitignore", ".rayignore"):
        (checkout / name).write_text((ROOT / name).read_text())
    excludes = get_runtime_env_default_excludes()
    create_package(str(checkout), tmp_path / "a.zip", include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(tmp_path / "a.zip") as package:
        uploaded = {name for name in package.namelist() if not name.endswith("/")}
    assert not uploaded & set(LARGE)
    folders = ("reinforce", "teachers", "schemas", "jobs", "configs")
    code = {name for name in tracked if name.split("/")[0] in folders}
    assert code | {"mine/teachers.py", "mine/run.yaml"} <= uploaded
    assert {name.split("/")[0] for name in uploaded if "/" in name} == {*folders, "mine"}
    size = sum((ROOT / name).stat().st_size for name in uploaded & set(tracked))
    assert size < 20e6, "of which the models of the demo are 12 MB"
