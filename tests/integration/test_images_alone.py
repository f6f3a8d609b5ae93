"""A folder of photos without any text, and every command that a user runs on it and on its dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import reinforce
from reinforce.config import load_config
from reinforce.dataset.manifest import read_manifest
from reinforce.dataset.store import Store
from tests.helpers.commands import Command
from tests.helpers.data import picture
from tests.helpers.models import tiny_models
from tests.helpers.reinforced import fresh_dataset
from tests.helpers.students import student_folder
from tests.helpers.trainings import rows

IMAGES = 12
TEACHERS = ("dinov2", "siglip", "vit", "own")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with photos, one of them twice, and some of them as an evaluation's."""
    monkeypatch.chdir(tmp_path)
    for number in range(IMAGES):
        for name in ("photos", *["held-out"] * (number > 9)):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{number:02d}.png").write_bytes(picture(number))
    (tmp_path / "photos" / "again.png").write_bytes(picture(0))
    return tmp_path


def teachers(folder: Path) -> dict[str, Any]:
    """Image teachers of transformers, of timm, and of a class."""
    return {
        "dinov2": {"family": "transformers", "model": tiny_models.transformers_dinov2(folder / "dinov2")},
        "siglip": {"family": "transformers", "model": tiny_models.transformers_siglip_images(folder / "siglip")},
        "vit": {"family": "timm", "model": tiny_models.timm_vit(folder / "vit")},
        "own": {"class": "tests.helpers.models:ImageOnly"},
    }


@pytest.mark.usefixtures("ray_session", "no_pictures")
def test_a_folder_of_photos_walks_through_every_command(folder: Path, command: Command) -> None:
    def done(*words: str) -> str:
        status, out, err = command(*words)
        assert status == 0, out + err
        return out + err

    assert "images alone are read" in done("init", "photos", "my.yaml")
    config = yaml.safe_load(Path("my.yaml").read_text())
    config |= {"teachers": teachers(folder), "augmentations": {"count": 2, "size": 32}, "workers": {"batch": 4}}
    Path("my.yaml").write_text(yaml.safe_dump(config))
    checked = done("check", "my.yaml")
    assert [line.split()[1] for line in checked.splitlines() if line.startswith(TEACHERS)] == ["images"] * 4
    planned = done("plan", "my.yaml")
    assert ", no caption" in planned
    assert "embeddings/vit/images" in planned
    assert reinforce.run(load_config("my.yaml")).status == 0
    url = config["output"]
    manifest = read_manifest(Store(url))
    assert {*manifest["layers"]} == {"samples", *(f"embeddings/{name}/images" for name in TEACHERS)}
    assert {name: manifest["teachers"][name]["dim"] for name in TEACHERS[:3]} == {"dinov2": 32, "siglip": 32, "vit": 64}
    assert "1/1" in done("status", url)
    assert "valid" in done("validate", url)
    [sample] = [one for one in reinforce.open(url) if one.key == "03"]
    assert (sample.caption, any(sample.texts.values()), sample.images["vit"].shape) == (None, False, (2, 64))

    done("inspect", url, "report")
    assert json.loads(Path("report/report.json").read_text())["captions"]["texts"]["caption"]["captions"] == 0
    assert not Path("report/captions.html").exists()
    page = Path("report/neighbours.html").read_text()
    assert page.count("<h3>vit</h3>") == IMAGES + 1

    rules = [
        {"deduplicate": {"exact": True}},
        {"deduplicate": {"teacher": "vit", "threshold": 0.99999}},
        {"balance": {"teacher": "dinov2", "clusters": [4, 2], "keep": 1.0}},
        {"decontaminate": {"against": ["held-out"], "teacher": "dinov2", "threshold": 0.99999, "config": "my.yaml"}},
    ]
    Path("select.yaml").write_text(yaml.safe_dump({"dataset": url, "name": "clean", "rules": rules}))
    assert f"{IMAGES - 2} of {IMAGES + 1} samples are kept" in done("select", "select.yaml")
    done("inspect", url, "of-view", "--view", "clean")

    done("export", "labels", url, "labels")
    labels = {"mine": {"url": "labels", "layers": ["embeddings/vit"]}}
    fresh_dataset({**config, "output": "again", "labels": labels, "teachers": {"vit": config["teachers"]["vit"]}})
    assert [name for name in reinforce.open("again").layers if name.startswith("embeddings/")] == [
        "embeddings/vit/images"
    ]
    pairs = zip(reinforce.open(url, teachers=["vit"]), reinforce.open("again"), strict=True)
    others = [a.key for a, b in pairs if a.images["vit"].tolist() != b.images["vit"].tolist()]
    assert others == ["again"], "a copy of the first photo takes the label of that"
    done("drop", "again", "embeddings/vit/*", "--yes")
    done("export", "embeddings", url, "vectors", "--teacher", "vit", "--texts", "none")

    train = {
        "output": "student",
        "student": {"model": student_folder(folder / "architecture")},
        "data": {"datasets": [{"url": url, "view": "clean"}], "captions": "none", "workers": 0},
        "train": {"steps": 2, "batch": 4, "optimizer": {"warmup": 0}, "log_every": 1},
    }
    Path("student.yaml").write_text(yaml.safe_dump(train))
    done("train", "student.yaml")
    assert all(row["losses"].keys() == {"features/image"} for row in rows(folder / "student") if "losses" in row)
    train["data"] |= {"captions": "both"}
    Path("student.yaml").write_text(yaml.safe_dump({**train, "output": "other"}))
    status, _, err = command("train", "student.yaml")
    assert (status, "For images alone set data.captions to none" in err) == (2, True)
