"""Small students: architectures without weights, in folders that open_clip reads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch

from reinforce import settings
from reinforce.student.config import Student as StudentSpec
from reinforce.student.config import StudentConfig
from reinforce.student.model import StudentModel, build_student
from reinforce.student.teachers import IMAGES, TEXTS, TeacherInfo
from reinforce.student.terms.features import Features
from reinforce.student.terms.registry import Terms
from reinforce.student.train import StudentTask, build
from reinforce.training.task import Batch
from teachers.runtime.accelerator import Accelerator
from tests.helpers.models.tiny_models import TOKENS, TOWER, open_clip_config, save_open_clip, tokenizer
from tests.helpers.shipping import FASTVIT

KINDS = ("vit", "mobileclip", "hf")
PAIRS = 6  # of a batch of a config's training
IMAGE_TEACHER = TeacherInfo(6, frozenset([IMAGES]), None, "")
TEACHER = TeacherInfo(5, frozenset([IMAGES, TEXTS]), 50.0, "")


def student_folder(folder: Path, kind: str = "vit", **changes: Any) -> str:
    """Write an ``open_clip_config.json`` and return the model's name; ``changes`` update its ``model_cfg``.

    ``vit`` is like OpenAI's CLIP; ``mobileclip`` has a small FastViT and a text tower that is not causal,
    like MobileCLIP2-S0; ``hf`` has a text tower and a tokenizer from transformers.
    """
    config = open_clip_config(context_length=16)
    if kind == "mobileclip":
        config["vision_cfg"] = {**FASTVIT, "timm_drop": 0.0, "timm_drop_path": 0.0, "image_size": 64}
        config["text_cfg"]["no_causal_mask"] = True
        config["custom_text"] = True
    elif kind == "hf":
        from transformers import RobertaConfig

        text = RobertaConfig(vocab_size=300, max_position_embeddings=32, pad_token_id=0, **TOWER)
        text.save_pretrained(folder / "text")
        tokenizer(folder, **{**TOKENS, "length": 16})
        config["text_cfg"] = {
            "hf_model_name": str(folder / "text"),
            "hf_tokenizer_name": "of this folder",
            "hf_pooler_type": "mean_pooler",
            "context_length": 16,
        }
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    return save_open_clip(folder, config, {})


def student_config(folder: Path, datasets: Any, kind: str = "vit", **sections: Any) -> StudentConfig:
    """A training of two steps in this process; the keys of ``sections`` replace those of its sections."""
    config: dict[str, Any] = {
        "output": str(folder / "out"),
        "student": {"model": student_folder(folder / "student", kind)},
        "data": {"datasets": datasets, "workers": 0, "window": 12},
        "train": {"steps": 2, "batch": 8, "optimizer": {"warmup": 0}, "log_every": 1},
    }
    changed = {name: {**config.get(name, {}), **keys} for name, keys in sections.items()}
    return settings.parse(StudentConfig, {**config, **changed})


def first_batch(config: StudentConfig) -> tuple[StudentTask, Batch]:
    """The task of a config, and its first batch as a step computes with it."""
    task, feed = build(config, Accelerator("cpu"))
    return task, task.prepare(next(iter(feed.batches(0, 1, config.train.batch, 0))))


def losses_of(task: StudentTask, batch: Batch) -> dict[str, torch.Tensor]:
    encoded = task.model(batch)
    return {**task.losses(encoded, batch), **encoded.losses}


def batch(size: int, pairs: int = 4, context: int = 16, kinds: tuple[str, ...] = ("caption", "synthetic")) -> Any:
    """A batch of noise images and of token ids that are valid for all models above; texts end with the end token."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (pairs, size, size, 3), generator=generator, dtype=torch.uint8)
    made: dict[str, Any] = {"key": [str(i) for i in range(pairs)], "image": images}
    for kind in kinds:
        made[kind] = torch.randint(3, 298, (pairs, context), generator=generator)
        made[kind][:, -1] = 299
    return made


def built(
    name: str,
    seed: int = 0,
    pretrained: str | None = None,
    preprocess: Any = None,
    features: Mapping[str, TeacherInfo] | None = None,
    weight: float = 1.0,
    **options: Any,
) -> StudentModel:
    """A student with heads for the vectors of the teachers in ``features``."""
    spec = StudentSpec(model=name, pretrained=pretrained, preprocess=preprocess)
    return build_student(spec, seed=seed, terms=Terms([Features(weight, features or {})]), **options)


def batch_for(student: StudentModel, pairs: int = 4, **options: Any) -> Any:
    """A batch with targets for the heads of the student."""
    made = batch(student.image.height, pairs, **options)
    generator = torch.Generator().manual_seed(1)
    made["targets"] = {
        name: {
            what: torch.nn.functional.normalize(torch.randn(pairs, teacher.dim, generator=generator), dim=-1)
            for what in ("image", "caption", "synthetic")
            if teacher.has(what)
        }
        for term in student.terms.terms
        if isinstance(term, Features)
        for name, teacher in term.teachers.items()
    }
    return made


def plain_open_clip(name: str) -> Any:
    """The model that open_clip itself loads of ``local-dir:FOLDER``."""
    with inside(name.removeprefix("local-dir:")):
        return open_clip.create_model("local-dir:.").eval()


@contextlib.contextmanager
def inside(folder: str) -> Iterator[None]:
    """Let a folder be the current one, because open_clip finds a text tower beside the weights only from there."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def train_briefly(student: StudentModel, steps: int = 2) -> None:
    """Change all weights and running statistics a little, as training does."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        encoded = student(batch_for(student))
        cosines = encoded.features["image"] @ encoded.features["caption"].T
        logits = cosines * encoded.scalars["logit_scale"] + encoded.scalars.get("logit_bias", 0.0)
        torch.nn.functional.cross_entropy(logits, torch.arange(len(logits))).backward()
        optimizer.step()
