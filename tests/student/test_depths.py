"""Layer-wise decay of the learning rate: timm's groups for its towers, blocks of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.optim import param_groups_layer_decay

import reinforce
from reinforce.errors import UserError
from reinforce.student.model import StudentModel, build_student
from reinforce.training.checkpoints import make_adamw
from reinforce.training.config import Optimizer
from tests.helpers.students import TEACHER, built, student_config, student_folder

DECAYS = {"image": 0.5, "text": 0.8}
TEXT = {"ln_final": 0, "text_projection": 0, "transformer.resblocks.1": 1, "transformer.resblocks.0": 2,
        "token_embedding": 3, "positional_embedding": 3}  # fmt: skip
#: By a name of a tiny student: its kind, its ``vision_cfg``, and the depths of weights by the start of their names.
STUDENTS: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "vit": ("vit", {}, {
        "visual.proj": 0, "visual.ln_post": 0, "visual.transformer.resblocks.1": 1, "visual.transformer.resblocks.0": 2,
        "visual.conv1": 3, "visual.class_embedding": 3, "visual.positional_embedding": 3, "visual.ln_pre": 3, **TEXT,
    }),
    "fastvit": ("mobileclip", {}, {
        "visual.trunk.head": 0, "visual.trunk.final_conv": 0, "visual.trunk.stages.1": 1, "visual.trunk.stages.0": 2,
        "visual.trunk.stem": 3, **{f"text.{name}": depth for name, depth in TEXT.items()},
    }),
    "resnet": ("vit", {"layers": [1, 2, 1, 1], "width": 16}, {
        "visual.attnpool": 0, "visual.layer4.0": 1, "visual.layer3.0": 2, "visual.layer2.1": 3, "visual.layer2.0": 4,
        "visual.layer1.0": 5, "visual.conv1": 6, "visual.bn3": 6, **TEXT,
    }),
    "timm": ("vit", {"timm_model_name": "resnet10t", "image_size": 64}, {
        "visual.head.proj": 0, "visual.trunk.layer4.0": 1, "visual.trunk.layer3.0": 2, "visual.trunk.layer2.0": 3,
        "visual.trunk.layer1.0": 4, "visual.trunk.conv1": 5, **TEXT,
    }),
    "hf": ("hf", {}, {
        "visual.proj": 0, "text.transformer.encoder.layer.1": 1, "text.transformer.encoder.layer.0": 2,
        "text.transformer.embeddings": 3,
    }),
}  # fmt: skip


def scales(student: StudentModel, config: Optimizer) -> dict[str, float]:
    found = {id(p): group["scale"] for group in make_adamw(student, config).param_groups for p in group["params"]}
    return {name: found[id(p)] for name, p in student.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", STUDENTS)
def test_rates_fall_from_block_to_block_towards_the_stem_of_each_tower(tmp_path: Path, name: str) -> None:
    kind, vision, depths = STUDENTS[name]
    student = built(student_folder(tmp_path, kind, vision_cfg=vision), features={"t": TEACHER})
    found = scales(student, Optimizer(layer_decay=DECAYS))
    for part, depth in depths.items():
        decay = DECAYS["image" if part.startswith("visual") else "text"]
        assert {value for key, value in found.items() if key.startswith(f"clip.{part}")} == {decay**depth}, part
    assert all(value == 1 for key, value in found.items() if student.tower_of(key) is None), "heads and logit scale"


def test_the_scales_of_a_fastvit_are_those_of_timm(tmp_path: Path) -> None:
    student = built(student_folder(tmp_path, "mobileclip"))
    theirs = {
        id(p): group["lr_scale"]
        for group in param_groups_layer_decay(student.clip.visual.trunk, layer_decay=0.5)
        for p in group["params"]
    }
    found = scales(student, Optimizer(layer_decay={"image": 0.5}))
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            assert found[name] == theirs.get(id(parameter), 1.0), name


@pytest.mark.usefixtures("no_pictures")
def test_the_first_step_of_a_training_moves_each_block_by_its_rate(tmp_path: Path, labelled: str) -> None:
    optimizer = {"lr": 0.01, "warmup": 0, "hold": 1, "weight_decay": 0.0, "layer_decay": {"image": 0.5}}
    config = student_config(tmp_path, labelled, train={"steps": 1, "optimizer": optimizer})
    before = build_student(config.student, seed=config.seed).clip.state_dict()
    trained = reinforce.train(config)
    after = load_file(Path(trained.output) / trained.export / "open_clip_model.safetensors")
    names = ("visual.proj", "visual.transformer.resblocks.0.mlp.c_fc.weight", "visual.conv1.weight", "text_projection")
    moved = [(after[name] - before[name]).abs().max().item() for name in names]
    assert moved == pytest.approx([0.01, 0.0025, 0.00125, 0.01], rel=0.01)  # AdamW's first step is the rate


def test_decay_adds_groups_to_those_of_towers(tmp_path: Path) -> None:
    student = built(student_folder(tmp_path))
    decayed = make_adamw(student, Optimizer(towers={"text": 0.5}, layer_decay={"text": 0.5})).param_groups
    kinds = {(group["tower"], group["scale"]) for group in decayed}
    assert kinds == {(None, 1.0), ("text", 1.0), ("text", 0.5), ("text", 0.25), ("text", 0.125)}
    plain = make_adamw(student, Optimizer(towers={"text": 0.5})).param_groups
    assert [(group["tower"], group["scale"], bool(group["weight_decay"])) for group in plain] == [
        (None, 1.0, True), (None, 1.0, False), ("text", 1.0, True), ("text", 1.0, False),
    ]  # fmt: skip


def test_decay_of_blocks_that_are_not_learnt_or_not_known_is_refused(tmp_path: Path) -> None:
    student = built(student_folder(tmp_path))
    student.towers = frozenset(["image", "text"])
    for key in ("towers", "layer_decay"):
        with pytest.raises(UserError, match=rf"train\.optimizer\.{key} is for students"):
            make_adamw(torch.nn.Linear(2, 2), Optimizer(**{key: DECAYS}))
    with pytest.raises(UserError, match=r"layer_decay: no weights of images are learnt; name image or text"):
        make_adamw(student, Optimizer(layer_decay={"images": 0.5}))
    student.clip.visual = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"layer_decay: the blocks of this image tower are not known; remove it"):
        make_adamw(student, Optimizer(layer_decay=DECAYS))
    student.freeze(["text"])
    with pytest.raises(UserError, match=r"layer_decay: no weights of text are learnt"):
        make_adamw(student, Optimizer(layer_decay={"text": 0.5}))
