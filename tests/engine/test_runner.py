"""Checks before a run starts."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import s3fs
import yaml

from reinforce.cli import main
from reinforce.config import parse_config
from reinforce.engine.plan import make_plan
from reinforce.engine.runner import as_config, check_source, run
from reinforce.errors import UserError
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.published import ALL, published_members, source_members, write_published
from tests.helpers.published import config_of as published_config

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


def test_a_source_of_which_no_probed_file_can_be_read_is_a_user_error(tmp_path: Path) -> None:
    config = parse_config(config_of(f"{tmp_path}/source/{{0..9}}.tar", tmp_path / "out"))
    with pytest.raises(UserError, match=r"^source cannot be read: .*/0\.tar does not exist; .*/5\.tar .*/9\.tar "):
        check_source(make_plan(config))
    write_tar(tmp_path / "source" / "5.tar", members_of(0, 1))
    check_source(make_plan(config))


def test_unreadable_reinforcements_are_reported_under_their_config_key(tmp_path: Path) -> None:
    write_published(tmp_path, [source_members(ALL[0])], [published_members(ALL[0])])
    config = published_config(tmp_path, reinforcements=f"{tmp_path}/nowhere/00000.tar")
    with pytest.raises(UserError, match=r"^reinforcements cannot be read: .*/nowhere/00000\.tar does not exist"):
        check_source(make_plan(parse_config(config)))
    check_source(make_plan(parse_config(published_config(tmp_path))))


def test_a_config_is_accepted_as_an_object_a_mapping_and_a_file(tmp_path: Path) -> None:
    mapping = config_of("x.tar", tmp_path / "out")
    config = as_config(mapping)
    assert as_config(config) is config
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(mapping))
    assert as_config(path) == as_config(str(path)) == config


def test_a_run_warns_once_of_a_class_without_a_version(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(f"{tmp_path}/{{0..1}}.tar", tmp_path / "out")
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="source cannot be read"):
        run(config)
    assert caplog.text.count("class tests.helpers.models:ColorTeacher has no `version`") == 1
