"""Texts of other languages that learn the vectors of the true caption, with and without images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file

import reinforce
from reinforce.errors import UserError
from reinforce.student.data.feed import StudentFeed
from reinforce.student.train import build
from teachers.runtime.accelerator import Accelerator
from tests.helpers.data import config_of, picture, write_tar
from tests.helpers.in_loaders import letters
from tests.helpers.reinforced import reinforce_here
from tests.helpers.students import student_config, student_folder
from tests.helpers.trainings import curve

ROWS = 12
INTO_SPACE = {"features": {"teachers": "all", "head": "none"}}


@pytest.fixture(scope="module")
def teacher(teachers: dict[str, dict[str, Any]]) -> str:
    model: str = teachers["vit"]["model"]
    return model


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, teacher: str) -> str:
    """Row n has one German text, or none where n is 5, and n % 3 texts of another language."""
    folder = tmp_path_factory.mktemp("dataset")
    members = []
    for n in range(ROWS):
        german = {} if n == 5 else {"de": f"Ding {n}"}
        about = {**german, "other": [f"other {n} {i}" for i in range(n % 3)]}
        members += [
            (f"{n:03}.png", picture(n)),
            (f"{n:03}.txt", f"thing {n}".encode()),
            (f"{n:03}.json", json.dumps(about).encode()),
        ]
    write_tar(folder / "source" / "0.tar", members)
    teachers = {"vit": {"model": teacher, "codec": "float32"}}
    return reinforce_here(config_of(f"{folder}/source/*.tar", folder / "reinforced", teachers=teachers))


def batch_of(dataset: str, tmp_path: Path, **data: Any) -> Any:
    config = student_config(tmp_path, dataset, data={"teachers": ["vit"], **data})
    feed = StudentFeed(config.data, 0, 8, letters)
    return next(iter(feed.batches(0, 1, 10, 0)))


def test_a_parallel_text_has_the_vector_of_the_true_caption_of_its_row(
    dataset: str, tmp_path: Path, teacher: str
) -> None:
    model = open_clip.create_model(teacher).eval()
    tokenize = open_clip.get_tokenizer(teacher)
    for data in ({"parallel": ["json:de", "json:other"]}, {"parallel": {"namer": 1}}, {"parallel": ["json:de"]}):
        batch = batch_of(dataset, tmp_path, captioners=[], **data)
        assert batch["image"].shape == (10, 8, 8, 3)
        assert torch.equal(batch["targets"]["vit"]["caption"], batch["targets"]["vit"]["synthetic"])
        numbers = [*map(int, batch["key"])]
        with torch.no_grad():
            expected = model.encode_text(tokenize([f"thing {n}" for n in numbers]), normalize=True)
        torch.testing.assert_close(batch["targets"]["vit"]["caption"], expected)
        if data == {"parallel": ["json:de"]}:
            assert 5 not in numbers, "it has no German text"
            assert torch.equal(batch["synthetic"], letters([f"Ding {n}" for n in numbers]))
    mixed = batch_of(dataset, tmp_path, captioners=[], parallel=["json:de"], captions="mixed", synthetic=1.0)
    assert "synthetic" not in mixed
    assert torch.equal(mixed["caption"][:, 0], letters(["Ding"] * 10)[:, 0])


def test_a_text_tower_learns_a_teachers_space_from_texts_alone(dataset: str, tmp_path: Path, teacher: str) -> None:
    small = student_folder(tmp_path / "small", "hf", embed_dim=9)

    def config(steps: int = 2, **data: Any) -> Any:
        student = {"model": teacher, "text": {"model": small}}
        data = {"teachers": ["vit"], "captioners": [], "parallel": ["json:de"], "images": "none", **data}
        train = {"steps": steps, "batch": 6, "optimizer": {"lr": 0.01, "warmup": 0}, "checkpoints": {"every": 1}}
        return student_config(tmp_path, dataset, student=student, data=data, loss=INTO_SPACE, train=train)

    task, feed = build(config(), Accelerator("cpu"))
    batch = next(iter(feed.batches(0, 1, 6, 0)))
    assert "image" not in batch
    assert task.prepare(batch).keys() == {"caption", "synthetic", "targets"}
    assert {name for name, value in task.model.named_parameters() if value.requires_grad} == {
        name for name, _ in task.model.named_parameters() if name.startswith("clip.text.")
    }
    assert reinforce.train(config(6)).steps == 6
    losses = curve(tmp_path / "out")
    assert losses[-1] < losses[0]
    assert reinforce.train(config(7)).steps == 7, "it resumes"
    before = load_file(f"{teacher.removeprefix('local-dir:')}/open_clip_model.safetensors")
    after = load_file(tmp_path / "out/student/open_clip_model.safetensors")
    same = [name for name in before if name.startswith("visual") or name == "logit_scale"]
    assert all(torch.equal(after[name], before[name]) for name in same)
    again = build(config(workers=1), Accelerator("cpu"))[1]
    assert next(iter(again.batches(0, 1, 6, 0))).keys() == batch.keys(), "loader processes"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"parallel": ["json:fr"]}}, r"have no text at json:fr; their metadata has .*de, other"),
        ({"data": {"parallel": ["nobody"]}}, "has no captioner 'nobody'; it has: namer"),
        ({"data": {"parallel": ["json:de"], "captions": "none"}}, "reads no text, which `parallel` needs"),
        ({"data": {"images": "none", "captions": "none"}}, "which `images: none` needs"),
        ({"data": {"images": "none"}, "loss": {"learn_scales": True}}, r"data\.images: none there are no similarities"),
        ({"data": {"images": "none"}, "loss": {"probabilities": 1.0}}, r"texts alone: remove loss\.probabilities"),
        ({"data": {"images": "none"}, "loss": {"lambda": 0.0}}, "data.images is none, so only texts are read, and no"),
        ({"data": {"images": "none"}, "loss": {"interactive": 1.0}}, "interactive needs a teacher with vectors of"),
        ({"data": {"images": "none"}, "student": {"freeze": ["text"]}}, "images: none only the text tower is trained"),
    ],
)
def test_keys_that_do_not_fit_are_refused(
    sections: dict[str, Any], message: str, dataset: str, tmp_path: Path, teacher: str
) -> None:
    student = {"model": teacher, **sections.get("student", {})}
    with pytest.raises(UserError, match=message):
        build(student_config(tmp_path, dataset, **{**sections, "student": student}), Accelerator("cpu"))
