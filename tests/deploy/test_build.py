"""The images, built where DEPLOY_BUILD says how."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REASON = "set DEPLOY_BUILD to the command that builds an image, such as DEPLOY_BUILD='docker build' (minutes)"


@pytest.mark.skipif("DEPLOY_BUILD" not in os.environ, reason=REASON)
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("image", ["cpu", "cuda"])
def test_images_build(image: str) -> None:
    command = [*shlex.split(os.environ["DEPLOY_BUILD"]), "-f", f"deploy/docker/{image}.Dockerfile"]
    done = subprocess.run([*command, "-t", f"reinforce:{image}", "."], cwd=ROOT, check=False)
    assert done.returncode == 0
