"""The Grafana dashboard of a run, and where the Grafana of a Ray cluster looks for dashboards."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from reinforce.errors import UserError

NAME = "reinforce_grafana_dashboard.json"
_FOLDER_VARIABLE = "RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"  # Ray's, for its own dashboards
_SESSION_FOLDER = "/tmp/ray/session_latest/metrics/grafana/dashboards"  # noqa: S108 - Ray's default


def dashboard_text() -> str:
    """The dashboard as JSON."""
    return files("reinforce.engine").joinpath("grafana_dashboard.json").read_text(encoding="utf-8")


def ray_folder() -> Path:
    """The folder in which Ray puts its own dashboards on this machine."""
    return Path(os.environ.get(_FOLDER_VARIABLE) or _SESSION_FOLDER)


def write_dashboard(folder: Path | None = None) -> Path:
    """Write the dashboard into a folder, by default beside those of Ray. Raises UserError."""
    target = folder or ray_folder()
    if folder is None and not target.is_dir():
        raise UserError(f"{target} does not exist: name a folder, or start Ray with its dashboard on this machine.")
    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / NAME).write_text(dashboard_text(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{target / NAME} cannot be written: {error}.") from error
    return target / NAME
