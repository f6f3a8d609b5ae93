"""The Dockerfiles, scripts and units of deploy/, by their linters."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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
