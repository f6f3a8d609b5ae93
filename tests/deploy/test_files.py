"""The files of deploy/: images, scripts, units and the folder that a job uploads, by their linters; and its README."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
IMAGES = ("cpu", "cuda")


def tool(name: str) -> str:
    """The path of a linter, which a package of the extra `test` brings. Skips without it."""
    return shutil.which(name, path=f"{BIN}:{os.environ['PATH']}") or pytest.skip(f"{name} is not installed")


def scripts() -> dict[str, str]:
    """Shell code by name: the Slurm script, and commands in YAML."""
    sky = yaml.safe_load((DEPLOY / "skypilot/reinforce.yaml").read_text())
    found = {"slurm": (DEPLOY / "slurm/reinforce.sbatch").read_text()}
    found |= {f"skypilot {key}": f"#!/bin/bash\n{sky[key]}" for key in ("setup", "run")}
    for cloud in ("aws", "gcp"):
        launcher = yaml.safe_load((DEPLOY / f"launcher/{cloud}.yaml").read_text())
        for key in ("head_start_ray_commands", "worker_start_ray_commands"):
            # RAY_HEAD_IP is set by the launcher
            found[f"{cloud} {key}"] = "#!/bin/bash\nexport RAY_HEAD_IP=1.2.3.4\n" + "\n".join(launcher[key]) + "\n"
    return found


@pytest.mark.parametrize(("name", "code"), scripts().items())
def test_shell_code_passes_shellcheck(name: str, code: str) -> None:
    # SC1090: a virtual environment; SC2046: words of `jobs -p`; SC2086, SC2088: the words and `~` are for Ray
    command = [tool("shellcheck"), "--norc", "--exclude=SC1090,SC2046,SC2086,SC2088", "-"]
    done = subprocess.run(command, input=code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{name}: {done.stdout}"


@pytest.mark.parametrize("image", IMAGES)
def test_dockerfiles_pass_hadolint(image: str) -> None:
    command = [tool("hadolint"), "--format=json", DEPLOY / f"docker/{image}.Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert json.loads(done.stdout) == [], done.stderr


@pytest.mark.parametrize("image", IMAGES)
def test_images_are_pinned_run_without_root_and_copy_what_the_context_has(image: str) -> None:
    text = (DEPLOY / f"docker/{image}.Dockerfile").read_text()
    build, final = text.split("\nFROM ${BASE}\n")
    assert "--constraint constraints.txt" in build
    assert re.search(r"^USER 1000$", final, re.MULTILINE)
    torch, vision = re.findall(r"ARG (?:TORCH|TORCHVISION)=(\S+)", build)
    tested = (ROOT / "constraints.txt").read_text()
    assert f"tested: {'.'.join(torch.split('.')[:2])} and {'.'.join(vision.split('.')[:2])}" in tested
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY") and "--from" not in line]
    assert {name for names in copied for name in names} == allowed
    assert all((ROOT / name).exists() for name in allowed)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("unit", ["ray-head", "ray-node"])
def test_units_are_valid_for_systemd(unit: str, tmp_path: Path) -> None:
    text = (DEPLOY / f"systemd/{unit}.service").read_text()
    (tmp_path / f"{unit}.service").write_text(text.replace("/opt/venv/bin/ray ", f"{shutil.which('true')} "))
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / f"{unit}.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_command_lines_of_ray_start_are_those_of_the_installed_ray() -> None:
    from ray.scripts.scripts import cli

    texts = [path.read_text() for path in DEPLOY.rglob("*") if path.suffix in {".yaml", ".sbatch", ".service", ".py"}]
    options = {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in cli.commands.items()
    }
    calls = [match for text in texts for match in re.finditer(r"\bray (start|health-check)\b([^\n;&|]*)", text)]
    assert len(calls) > 8
    for match in calls:
        assert set(re.findall(r"--[a-z-]+", match[2])) <= options[match[1]], match[0]
    drained = (DEPLOY / "drain_on_notice.py").read_text()
    assert set(re.findall(r"(--[a-z-]+)[=\"]", drained)) <= options["drain-node"]


REASON = "set DEPLOY_BUILD to the command that builds an image, such as DEPLOY_BUILD='docker build' (minutes)"


@pytest.mark.skipif("DEPLOY_BUILD" not in os.environ, reason=REASON)
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("image", ["cpu", "cuda"])
def test_images_build(image: str) -> None:
    command = [*shlex.split(os.environ["DEPLOY_BUILD"]), "-f", f"deploy/docker/{image}.Dockerfile"]
    done = subprocess.run([*command, "-t", f"reinforce:{image}", "."], cwd=ROOT, check=False)
    assert done.returncode == 0


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


def test_each_link_has_a_file_and_each_file_is_linked() -> None:
    text = (DEPLOY / "README.md").read_text()
    links = {(DEPLOY / link.split("#")[0]).resolve() for link in re.findall(r"\]\(([^)]+)\)", text)}
    assert [link for link in links if not link.exists()] == []
    files = {path for path in DEPLOY.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path for path in files if path not in links and path.parent not in links} == {DEPLOY / "README.md"}
