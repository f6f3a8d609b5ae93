"""Checks before a run starts."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from reinforce.config import Config, parse_config
from reinforce.dataset.manifest import read_manifest, write_manifest
from reinforce.dataset.store import Store
from reinforce.engine.plan.plan import build_layers, check_class_files, describe_models
from reinforce.engine.record import RunSummary
from reinforce.engine.run import run
from reinforce.errors import UserError
from reinforce.settings import as_config
from tests.helpers.commands import printed_by, run_command
from tests.helpers.data import config_of, members_of, picture, tree, write_tar
from tests.helpers.models import ColorTeacher
from tests.helpers.reinforced import reinforce_here


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end where they would start Ray."""

    def refuse(*_: object) -> None:
        raise UserError("no Ray here")

    monkeypatch.setattr("reinforce.processes.cluster.ray_cluster", refuse)


def test_a_config_is_accepted_as_an_object_a_mapping_and_a_file(tmp_path: Path) -> None:
    mapping = config_of("x.tar", tmp_path / "out")
    config = as_config(Config, mapping)
    assert as_config(Config, config) is config
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(mapping))
    assert as_config(Config, path) == as_config(Config, str(path)) == config


def test_a_run_warns_once_of_a_class_without_a_version(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(f"{tmp_path}/{{0..1}}.tar", tmp_path / "out")
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="source cannot be read"):
        run(config)
    assert caplog.text.count("class tests.helpers.models:ColorTeacher has no `version`") == 1


def test_a_run_warns_of_what_is_wrong_with_the_source_without_secrets(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, no_ray: None
) -> None:
    write_tar(tmp_path / "0.tar", [("b.png", picture(1)), ("b.t0ken-of-eve", b"a cat")])
    (tmp_path / "1.json").write_text("{}")
    options = {"hf_token": "t0ken-of-eve", "endpoint": "https://example.org"}
    teacher = {"class": "tests.helpers.models:TokenLeakingTeacher", "options": options}
    config = config_of(f"{tmp_path}/*.*", tmp_path / "out", captioners={}, teachers={"leaky": teacher})
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="no Ray here"):
        run(config)
    assert "source: 1 of 2 files are not tars by their names" in caplog.text
    assert "0.tar, b: no caption: looked for .txt, json:caption; the sample has .png, .(secret)" in caplog.text


CLASSES = {
    kind: f"from tests.helpers.{base} as Base\n\nclass Changing(Base):\n    version = 3\n"
    for kind, base in {
        "teachers": "models import ColorTeacher",
        "captioners": "models import SeedCaptioner",
        "scores": "models.scorers import Length",
    }.items()
}


@dataclass
class Changing:
    """A dataset of one of two shards, by a class in a file of its own."""

    folder: Path
    kind: str
    caplog: pytest.LogCaptureFixture

    def __post_init__(self) -> None:
        self.file = self.folder / f"changing_{self.kind}.py"
        self.spec = {"class": f"{self.file.stem}:Changing", **({"captions": 2} if self.kind == "captioners" else {})}
        self.file.write_text(CLASSES[self.kind])
        for number in range(2):
            write_tar(self.folder / "source" / f"{number}.tar", members_of(number, 2))
        reinforce_here(self.config("0"))

    def change(self) -> None:
        self.file.write_text(f"{self.file.read_text()}# other code\n")

    def config(self, shards: str = "*", **changes: Any) -> dict[str, Any]:
        models = {"teachers": {}, "captioners": {}, "scores": {}, self.kind: {"my": self.spec}}
        return config_of(f"{self.folder}/source/{shards}.tar", self.folder / "out", **{**models, **changes})

    def started(self, **options: Any) -> list[str]:
        """The warnings about the class of a run of both shards, up to where it starts Ray."""
        self.caplog.clear()
        with self.caplog.at_level(logging.WARNING), pytest.raises(UserError, match="no Ray here"):
            run(self.config(), **options)
        return [record.message for record in self.caplog.records if "has changed" in record.message]

    @property
    def hashes(self) -> list[str]:
        found: list[str] = self.entry(json.loads((self.folder / "out" / "dataset.json").read_text())).get("code", [])
        return found

    def entry(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """The entry of the class in a dataset.json."""
        found: dict[str, Any]
        found = manifest["layers"]["scores/my"] if self.kind == "scores" else manifest[self.kind]["my"]
        return found


@pytest.fixture(params=[*CLASSES])
def changing(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    no_ray: None,
) -> Changing:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # whichever tests ran before in this process
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, f"changing_{request.param}", raising=False)  # of the test before
    return Changing(tmp_path, request.param, caplog)


def test_a_run_that_would_mix_states_of_a_class_under_one_version_stops_unless_that_is_accepted(
    changing: Changing, capsys: pytest.CaptureFixture[str]
) -> None:
    """So does a plan, which shows the file of the class, and a worker whose file is another one does not start."""
    path = changing.folder / "config.yaml"
    path.write_text(yaml.safe_dump(changing.config()))
    config = parse_config(changing.config())
    layers = build_layers(config, describe_models(config))
    [first] = changing.hashes
    shown = f"{changing.kind[:-1]} my: class {changing.spec['class']}, version 3, file "
    assert f"{shown}{first}\n" in printed_by(capsys, "plan", str(path))
    [found] = json.loads(printed_by(capsys, "plan", str(path), "--json"))["class_files"]
    assert (found["code"], found["recorded"], found["changed"]) == (first, [first], False)
    check_class_files(config, layers.values(), "node-7")
    assert changing.started() == []
    assert changing.hashes == [first]

    changing.change()
    with pytest.raises(UserError, match=r"my: the file of class changing_\w+:Changing on node-7 is not that of"):
        check_class_files(config, layers.values(), "node-7")
    status, out, error = run_command(capsys, "plan", str(path))
    assert status == 2
    assert shown in out
    assert ", changed since its layers were computed\n" in out
    assert f"(hash {first} then, " in error
    run(changing.config("0"))  # nothing to compute: nothing is mixed, and nothing is recorded
    files = tree(changing.folder / "out", layers_only=False)
    with pytest.raises(UserError, match="One layer could have outputs of two models, so nothing was started") as raised:
        run(changing.config())
    assert tree(changing.folder / "out", layers_only=False) == files
    [accepted] = changing.started(accept_changed_classes=True)
    for message in (str(raised.value), accepted):
        assert message.startswith(f"{changing.kind[:-1]} my: the file of class {changing.spec['class']} has changed")
        assert f"(hash {first} then, " in message
        assert "and its `version` is still 3" in message
    reinforce_here(changing.config())
    assert len(changing.hashes) == 2
    write_tar(changing.folder / "source" / "2.tar", members_of(2, 2))
    assert changing.started() == []


def test_a_class_may_change_where_none_of_its_layers_is_computed_or_has_files_or_a_hash(changing: Changing) -> None:
    [first] = changing.hashes
    changing.change()
    with pytest.raises(UserError, match="no Ray here"):
        run(changing.config(captioners={}, teachers={}, scores={}))
    assert changing.hashes == [first]
    store = Store(str(changing.folder / "out"))
    whole = read_manifest(store)
    unhashed = copy.deepcopy(whole)
    del changing.entry(unhashed)["code"]
    write_manifest(store, unhashed)
    assert changing.started() == []
    write_manifest(store, whole)
    folder = {"teachers": "embeddings", "captioners": "captions", "scores": "scores"}[changing.kind]
    shutil.rmtree(changing.folder / "out" / folder)
    assert changing.started() == []
    assert changing.hashes == [], "of no file"


@pytest.mark.parametrize("missing", [False, True], ids=["nothing to compute", "a shard is missing"])
@pytest.mark.parametrize("lost", ["the file", "what its models state"])
def test_a_lost_manifest_is_written_again_with_what_its_models_state(
    missing: bool, lost: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, no_ray: None
) -> None:
    write_tar(tmp_path / "0.tar", members_of(0, 2))
    config = config_of(f"{tmp_path}/*.tar", tmp_path / "out")
    store = Store(reinforce_here(config))
    whole = read_manifest(store)
    assert (whole["teachers"]["blue"]["logit_scale"], whole["teachers"]["blue"]["dim"]) == (30.0, 12)
    if lost == "the file":
        os.remove(tmp_path / "out" / "dataset.json")
    else:
        entries = {name: {**entry, "dim": None, "image": None} for name, entry in whole["teachers"].items()}
        write_manifest(store, {**whole, "teachers": entries})
    if missing:
        write_tar(tmp_path / "1.tar", members_of(1, 2))
    with contextlib.nullcontext() if not missing else pytest.raises(UserError, match="no Ray here"):
        run(config)
    assert "does not state what red, blue have" in caplog.text
    found = read_manifest(store)
    for manifest in (found, whole):
        manifest.pop("digest")
        for entry in (*manifest["teachers"].values(), *manifest["captioners"].values()):
            entry.pop("code", None)  # the file of the class at that time is not known
    assert found == whole


def test_a_lost_manifest_whose_models_cannot_be_loaded_is_an_error_that_says_what_to_restore(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", members_of(0, 2))
    token = tmp_path / "token"
    token.touch()
    teacher = {"class": "tests.engine.test_run:Guarded", "options": {"path": str(token)}}
    config = config_of(f"{tmp_path}/0.tar", tmp_path / "out", captioners={}, teachers={"red": teacher})
    reinforce_here(config)
    token.unlink()
    os.remove(tmp_path / "out" / "dataset.json")
    with pytest.raises(UserError, match=r"out/dataset.json was lost or is incomplete: restore a copy\. .*no token"):
        run(config)
    assert not (tmp_path / "out" / "dataset.json").exists()


class Guarded(ColorTeacher):
    """A teacher that needs a file to be loaded."""

    def __init__(self, device: torch.device, path: str) -> None:
        super().__init__(device)
        if not os.path.exists(path):
            raise ValueError("no token")


def test_a_run_goes_on_with_shards_whose_files_were_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
    monkeypatch.setattr("reinforce.processes.cluster.ray_cluster", lambda _: contextlib.nullcontext())
    config = config_of(f"{tmp_path}/0.tar", tmp_path / "out")
    found = run(config)
    assert capsys.readouterr().out == "1 shard to compute; waiting for Ray\n", "before anything takes long"
    assert (found.status, found.message, found.postponed, left) == (0, "done", 0, [])
    assert (found.shards, found.samples, found.bytes, found.refused) == (5, 49, 110, {"no_text": 3})
    assert (found.busy_share, found.notes) == (0.3, ["x was set aside"])
    left = [summaries[0]] * 4
    assert run(config).status == 1, "files are damaged again and again"
    assert len(left) == 1
