"""Checks before a run starts."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from reinforce.config import Config
from reinforce.engine.record.summary import RunSummary
from reinforce.engine.run import run
from reinforce.errors import UserError
from reinforce.settings import as_config
from tests.helpers.data import config_of, members_of, picture, write_tar
from tests.helpers.reinforced import reinforce_here


def test_a_config_is_accepted_as_an_object_a_mapping_and_a_file(tmp_path: Path) -> None:
    mapping = config_of("x.tar", tmp_path / "out")
    config = as_config(Config, mapping)
    assert as_config(Config, config) is config
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(mapping))
    assert as_config(Config, path) == as_config(Config, str(path)) == config


def test_a_run_warns_once_of_a_class_without_a_version_and_of_a_key_without_effect(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(f"{tmp_path}/{{0..1}}.tar", tmp_path / "out", workers={"overlap": True})
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="source cannot be read"):
        run(config)
    assert caplog.text.count("class tests.helpers.models:ColorTeacher has no `version`") == 1
    assert caplog.text.count("workers.overlap has no effect; remove it") == 1


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


CLASS = """from tests.helpers.models import ColorTeacher

class Changing(ColorTeacher):
    version = 3
"""


@pytest.mark.parametrize("kind", ["teachers", "captioners"])
def test_a_class_whose_file_changed_without_its_version_is_warned_of_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"changing_{kind}"
    code = CLASS if kind == "teachers" else CLASS.replace("ColorTeacher", "SeedCaptioner")
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    write_tar(tmp_path / "source" / "0.tar", members_of(0, 2))
    spec = {"class": f"{name}:Changing", **({} if kind == "teachers" else {"captions": 2})}
    config = config_of(
        f"{tmp_path}/source/0.tar", tmp_path / "out", **{"teachers": {}, "captioners": {}, kind: {"my": spec}}
    )
    extended = {**config, "source": [f"{tmp_path}/source/0.tar", f"{tmp_path}/missing.tar"]}

    def warnings(config: dict[str, Any]) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="source cannot be read"):
            run(config)
        return [record.message for record in caplog.records if "has changed" in record.message]

    def recorded() -> list[str]:
        hashes: list[str] = json.loads((tmp_path / "out" / "dataset.json").read_text())[kind]["my"]["code"]
        return hashes

    reinforce_here(config)
    assert len(recorded()) == 1
    assert warnings(extended) == []
    (tmp_path / f"{name}.py").write_text(code + "# other code\n")
    run(config)  # nothing to compute: nothing is mixed, and nothing is recorded
    assert len(recorded()) == 1
    [warning] = warnings(extended)
    write_tar(tmp_path / "missing.tar", members_of(1, 2))
    reinforce_here(extended)
    first, second = recorded()
    assert f"{kind[:-1]} my: the file of class {name}:Changing has changed" in warning
    assert f"(hash {first} then, {second} now), and its `version` is still 3." in warning
    extended["source"].append(f"{tmp_path}/lost.tar")
    assert warnings(extended) == []


def test_a_run_goes_on_with_shards_whose_files_were_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "0.tar", members_of(0, 3))
    summaries = [
        RunSummary(
            run="r1", shards=4, samples=40, seconds=2.0, busy_share=0.5, bytes=100, refused={"no_text": 1}, status=1,
            message="not finished", notes=["x was set aside"], postponed=1,
        ),
        RunSummary(
            run="r2", shards=1, samples=9, seconds=2.0, busy_share=0.1, bytes=10, refused={"no_text": 2},
            message="done",
        ),
    ]  # fmt: skip
    left = [*summaries]

    class Recorded:
        def __init__(self, *_: object) -> None: ...

        def run(self) -> RunSummary:
            return left.pop(0)

    monkeypatch.setattr("reinforce.engine.driver.driver.Driver", Recorded)
    monkeypatch.setattr("reinforce.cluster.ray_cluster", lambda _: contextlib.nullcontext())
    config = config_of(f"{tmp_path}/0.tar", tmp_path / "out")
    found = run(config)
    assert (found.status, found.message, found.postponed, left) == (0, "done", 0, [])
    assert (found.shards, found.samples, found.bytes, found.refused) == (5, 49, 110, {"no_text": 3})
    assert (found.busy_share, found.notes) == (0.3, ["x was set aside"])
    left = [summaries[0]] * 4
    assert run(config).status == 1, "files are damaged again and again"
    assert len(left) == 1
