"""The Grafana dashboard, and the folder that it is written to. Its queries are tested in
tests/integration/test_captioners_run.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reinforce.engine.record.metrics import NAME, dashboard_text, write_dashboard
from reinforce.errors import UserError


def test_the_dashboard_is_written_to_a_folder_or_to_that_of_rays_dashboards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert write_dashboard(tmp_path / "new") == tmp_path / "new" / NAME
    monkeypatch.setenv("RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR", str(tmp_path / "ray"))
    with pytest.raises(UserError, match="ray does not exist: name a folder, or start Ray"):
        write_dashboard()
    (tmp_path / "ray").mkdir()
    assert json.loads(write_dashboard().read_text()) == json.loads(dashboard_text())


def test_panels_have_numbers_and_places_of_their_own() -> None:
    panels = json.loads(dashboard_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
    assert all(panel["description"] and panel["targets"] for panel in panels)
