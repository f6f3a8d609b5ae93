"""What README.md shows is run here, so that it cannot rot."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import reinforce
from reinforce import settings
from reinforce.cli import app
from reinforce.config import parse_config
from reinforce.student.config import StudentConfig
from reinforce.tuning.config import TuneConfig
from tests.helpers.data import members_of, write_tar
from tests.helpers.tiny_coca import coca_model
from tests.helpers.tiny_models import open_clip_model

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None) -> Path:
    """A dataset where README.md's snippets expect it, made with the class that README.md shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "our_teachers.py").write_text(blocks("python")[0])
    for shard in range(2):
        write_tar(tmp_path / "shards" / f"{shard}.tar", members_of(shard, 5))
    vit = open_clip_model(tmp_path / "vit", image_size=32, width=32, embed_dim=16, seed=0)
    config: dict[str, Any] = {
        "source": f"{tmp_path}/shards/*.tar",
        "output": f"{tmp_path}/demo/dataset",
        "augmentations": {"count": 2, "size": 32},
        "captioners": {"coca": {"model": coca_model(tmp_path / "coca"), "captions": 2, "max_length": 10}},
        "teachers": {"conv-64": {"model": vit}, "tiny": {"class": "our_teachers:Tiny", "options": {"width": 32}}},
        "workers": {"max": 1},
    }
    assert reinforce.run(config).status == 0
    yield tmp_path
    sys.modules.pop("our_teachers", None)


def test_the_snippets_run_and_agree(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, bare, zipped = blocks("python")
    assert len(own.strip().splitlines()) <= 25, "a teacher of one's own stays small"
    assert len(bare.strip().splitlines()) <= 6
    scope: dict[str, Any] = {}
    exec(bare, scope)
    exec(zipped, scope)
    assert "(16,)" in capsys.readouterr().out
    first = next(iter(reinforce.open("demo/dataset")))
    np.testing.assert_array_equal(scope["vectors"][0].astype(np.float32), first.images["conv-64"])
    assert scope["crop"].size == (32, 32)
    assert first.images["tiny"].shape == (2, 64)


def test_the_configs_shown_are_valid() -> None:
    run, captioners, published, student, tuning = (yaml.safe_load(block) for block in blocks("yaml"))
    assert set(parse_config(run).teachers) == {"dfn2b", "siglip", "ours"}
    assert set(parse_config({**run, **captioners}).captioners) == {"coca", "blip", "chat"}
    assert {spec.family for spec in parse_config(published).captioners.values()} == {"published"}
    assert settings.parse(StudentConfig, student).evaluate.best_metric == "zero_shot/imagenet/top1"
    assert settings.parse(TuneConfig, tuning).scales.keys() == {"dfn2b", "siglip"}


def test_every_file_and_command_named_exists() -> None:
    root = Path(__file__).parents[1]
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (root / link).exists(), link
    targets = re.findall(r"^([a-z-]+):.*##", (root / "Makefile").read_text(), flags=re.MULTILINE)
    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    commands |= {group.name for group in app.registered_groups if group.name}
    assert set(re.findall(r"^reinforce ([a-z-]+)", "\n".join(blocks("console")), flags=re.MULTILINE)) <= commands
    for target in re.findall(r"`?make ([a-z-]+)", "\n".join(blocks("console"))):
        assert target in targets
