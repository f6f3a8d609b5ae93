"""The tools of `make deploy-check` that are too large for every installation."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def deploy_tools() -> Path:
    """The folder of the commands that `make deploy-check` installs."""
    folder = os.environ.get("DEPLOY_TOOLS")
    if folder is None:
        pytest.skip("`make deploy-check` runs this: it installs SkyPilot and Kubernetes' schemas, 500 MB")
    return Path(folder).absolute()
