"""The example configs in configs/."""

from __future__ import annotations

import open_clip
import pytest
import yaml

from reinforce.captioning.config import load_captioner_config
from reinforce.config import load_config
from reinforce.demo.models import MODELS
from reinforce.student.config import load_student_config
from tests.helpers.demo import ROOT


def test_demo_config_uses_the_committed_models() -> None:
    config = load_config(ROOT / "configs/demo.yaml")
    assert (config.source, config.output) == ("demo/shards/*.tar", "demo/dataset")
    named = [spec.model for spec in [*config.teachers.values(), *config.captioners.values()]]
    assert {f"local-dir:configs/demo-models/{name}" for name in MODELS} == set(named)
    assert len(config.teachers) == 2


@pytest.mark.parametrize("name", ["conv-64", "conv-48"])
def test_teacher_configs_are_plain_clip(name: str) -> None:
    config = load_student_config(ROOT / f"configs/demo-teachers/{name}.yaml")
    assert (config.loss.lambda_, config.student.model) == (0, f"local-dir:demo/initial-models/{name}")
    assert load_config(ROOT / "configs/demo-teachers/samples.yaml").output == config.data.datasets[0].url


def test_captioner_configs_end_with_noun_phrases() -> None:
    first, second = (
        load_captioner_config(ROOT / f"configs/demo-teachers/coca-{half}.yaml") for half in ("pretrain", "finetune")
    )
    assert second.captioner.model == f"local-dir:{first.output}/captioner"
    assert (first.data.captions, second.data.captions) == (["txt"], ["json:phrase"])
    assert (first.seed, first.held_out) == (second.seed, second.held_out)


def test_every_section_of_the_demo_config_is_explained() -> None:
    lines = (ROOT / "configs/demo.yaml").read_text().splitlines()
    for key in yaml.safe_load("\n".join(lines)):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{key}:"))
        assert lines[at - 1].startswith("#"), key


def test_dfn5b_config_matches_the_paper() -> None:
    config = load_config(ROOT / "configs/dfn5b.yaml")
    assert config.images == "reference"
    assert (config.augmentations.count, config.augmentations.size, config.augmentations.scale) == (2, 224, (0.08, 1.0))
    teachers = {(t.model, t.pretrained, t.logit_scale, t.precision) for t in config.teachers.values()}
    assert teachers == {
        ("ViT-L-14-quickgelu", "dfn2b", 70, "bf16"),
        ("ViT-L-14", "dfn2b_s39b", 60, "bf16"),
    }
    (captioner,) = config.captioners.values()
    assert open_clip.get_pretrained_cfg(captioner.model, captioner.pretrained)
    assert (captioner.captions, captioner.top_p, captioner.max_length) == (5, 0.9, 77)
    for teacher in config.teachers.values():
        assert open_clip.get_pretrained_cfg(teacher.model, teacher.pretrained)
    assert (config.workers.min, config.workers.max, config.workers.gpus, config.workers.cpus) == (8, 512, 1, 12)
