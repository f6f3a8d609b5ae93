"""Checks before a run starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import s3fs

from reinforce.cli import main

ROOT = Path(__file__).parents[2]


def test_plan_reports_a_source_without_access_next_to_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    changes = ["--set", "source=s3://nobody/x.tar", "--set", f"output={tmp_path}/out"]
    with pytest.raises(SystemExit, match="0"):
        main(["plan", str(ROOT / "configs/dfn5b.yaml"), *changes])
    printed = capsys.readouterr()
    assert "1 shards, 1 with something missing" in printed.out
    assert "sizes are not known: source cannot be read: s3://nobody/x.tar: NoCredentialsError" in printed.err
    s3fs.S3FileSystem.clear_instance_cache()
