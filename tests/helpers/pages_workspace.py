"""A folder in which the examples of the pages run: the files that they name, in a size that takes seconds."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from tests.helpers.data import members_of, picture, write_tar
from tests.helpers.models.tiny_coca import coca_model
from tests.helpers.models.tiny_models import open_clip_model, timm_vit
from tests.helpers.pages import ROOT, blocks
from tests.helpers.students import student_folder

#: Pixels of the stored augmentations.
SIZE = 32


def write_inputs(folder: Path) -> None:
    """Write shards, models and the configs my.yaml, student.yaml, tune.yaml and finetune.yaml."""
    for shard in range(2):
        write_tar(folder / "shards" / f"{shard:05d}.tar", members_of(shard, 6))
    shutil.copy(folder / "shards" / "00000.tar", folder / "flickr30k-test.tar")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    cat = Image.linear_gradient("L").resize((60, 40))
    cat.putalpha(cat.copy())
    cat.save(folder / "cat.png", exif=exif)
    (folder / "our_teachers.py").write_text(blocks("docs/teachers.md", "python")[0].text)
    (folder / "our_scores.py").write_text(next(b for b in blocks("docs/choosing.md", "python") if b.file).text)
    for number in range(4):
        (folder / "photos").mkdir(exist_ok=True)
        (folder / "photos" / f"{number}.png").write_bytes(picture(number))
    for name in ("configs", "jobs"):
        os.symlink(ROOT / name, folder / name)
    for name, config in _configs(folder).items():
        (folder / name).write_text(yaml.safe_dump(config))


def _configs(folder: Path) -> dict[str, dict[str, Any]]:
    vit = open_clip_model(folder / "vit", image_size=SIZE, width=32, embed_dim=16, seed=0)
    run = {
        "source": f"{folder}/shards/*.tar",  # workers of a Ray that runs already have another folder
        "output": f"{folder}/my-data",
        "augmentations": {"count": 2, "size": SIZE},
        "captioners": {"coca": {"model": coca_model(folder / "coca"), "captions": 2, "max_length": 10}},
        "teachers": {
            "conv-64": {"model": vit, "logit_scale": 20},
            "tiny": {"class": "our_teachers:Tiny", "options": {"width": SIZE}},
        },
        "scores": {
            "match": {"similarity": ["conv-64", "tiny"], "texts": ["caption", "coca"]},
            "sharp": {"class": "our_scores:Sharpness"},
            "agreement": {"class": "our_scores:Agreement"},
        },
        "workers": {"max": 1, "batch": 8},
    }
    student = {
        "output": "runs/s0",
        "student": {"model": student_folder(folder / "student")},
        "data": {"datasets": "my-data", "teachers": ["conv-64", "tiny"], "workers": 0},
        "train": {"steps": 2, "batch": 4, "optimizer": {"warmup": 0}, "log_every": 1},
        "evaluate": {"retrieval": {"flickr": {"pairs": "flickr30k-test.tar"}}},
    }
    tuning = {
        "output": "runs/tuning",
        "student": "student.yaml",
        "scales": {"conv-64": [10, 20, 40]},
        "early_stopping": False,
        "screening": {"batches": 1},
    }
    captioner = {
        "output": "coca-mine",
        "captioner": {"model": coca_model(folder / "coca")},
        "data": {"source": "shards/*.tar"},
        "train": {"steps": 1, "batch": 2},
    }
    photos = {
        "source": f"{folder}/photos",
        "output": f"{folder}/photos-reinforced",
        "input": {"captions": "none"},
        "augmentations": {"count": 2, "size": SIZE},
        "teachers": {"vit": {"family": "timm", "model": timm_vit(folder / "timm")}},
        "workers": {"max": 1, "batch": 8},
    }
    selection = {"dataset": "my-data", "name": "best", "rules": [{"sample": 4}]}
    return {
        "my.yaml": run, "student.yaml": student, "tune.yaml": tuning, "finetune.yaml": captioner,
        "select.yaml": selection, "photos.yaml": photos,
    }  # fmt: skip
