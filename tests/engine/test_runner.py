"""Checks before a run starts."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml

from reinforce.engine.runner import as_config, run
from reinforce.errors import UserError
from tests.helpers.data import config_of, picture, write_tar


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


def test_a_run_warns_of_what_is_wrong_with_the_source_without_secrets(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise UserError("no Ray here")

    monkeypatch.setattr("reinforce.cluster.ray_cluster", refuse)
    write_tar(tmp_path / "0.tar", [("b.png", picture(1)), ("b.t0ken-of-eve", b"a cat")])
    (tmp_path / "1.json").write_text("{}")
    options = {"hf_token": "t0ken-of-eve", "endpoint": "https://example.org"}
    teacher = {"class": "tests.helpers.models:TokenLeakingTeacher", "options": options}
    config = config_of(f"{tmp_path}/*.*", tmp_path / "out", captioners={}, teachers={"leaky": teacher})
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="no Ray here"):
        run(config)
    assert "source: 1 of 2 files are not tars by their names" in caplog.text
    assert "0.tar, b: no caption: looked for .txt, json:caption; the sample has .png, .(secret)" in caplog.text
