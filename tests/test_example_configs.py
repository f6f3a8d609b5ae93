"""The example configs in configs/."""

from __future__ import annotations

import inspect

import open_clip
import pytest
import yaml
from open_clip.coca_model import CoCa

from examples.demo.models import MODELS
from reinforce import settings
from reinforce.captioning.config import CaptionerConfig
from reinforce.config import load_config
from reinforce.source.urls import expand
from reinforce.student.config import StudentConfig
from reinforce.tuning.adapt_config import AdaptConfig, Domain, training_config
from tests.helpers.demo import ROOT


def test_demo_config_uses_the_committed_models_and_explains_every_section() -> None:
    config = load_config(ROOT / "configs/demo.yaml")
    assert (config.source, config.output) == ("demo/shards/*.tar", "demo/dataset")
    named = [spec.model for spec in [*config.teachers.values(), *config.captioners.values()]]
    assert {f"local-dir:configs/demo-models/{name}" for name in MODELS} == set(named)
    assert len(config.teachers) == 3
    lines = (ROOT / "configs/demo.yaml").read_text().splitlines()
    for key in yaml.safe_load("\n".join(lines)):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{key}:"))
        assert lines[at - 1].startswith("#"), f"{key} is not explained"


@pytest.mark.parametrize("name", ["conv-64", "conv-48", "styles-64"])
def test_teacher_configs_are_plain_clip(name: str) -> None:
    config = settings.load(StudentConfig, ROOT / f"configs/demo-teachers/{name}.yaml")
    assert (config.loss.lambda_, config.student.model) == (0, f"local-dir:demo/initial-models/{name}")
    samples = load_config(ROOT / "configs/demo-teachers/samples.yaml").output
    assert config.data.datasets[0].url == (f"{samples}-styles" if name == "styles-64" else samples)
    assert config.data.datasets[0].url in (ROOT / "Makefile").read_text() + samples


def test_captioner_configs_end_with_noun_phrases() -> None:
    first, second = (
        settings.load(CaptionerConfig, ROOT / f"configs/demo-teachers/coca-{half}.yaml")
        for half in ("pretrain", "finetune")
    )
    assert second.captioner.model == f"local-dir:{first.output}/captioner"
    assert (first.data.captions, second.data.captions) == (["txt"], ["json:phrase"])
    assert (first.seed, first.held_out) == (second.seed, second.held_out)


def test_dfn5b_config_matches_the_paper() -> None:
    config = load_config(ROOT / "configs/dfn5b.yaml")
    assert config.images == "reference"
    assert (config.augmentations.count, config.augmentations.size, config.augmentations.scale) == (2, 224, (0.08, 1.0))
    teachers = {(t.model, t.pretrained, t.logit_scale, t.precision) for t in config.teachers.values()}
    assert teachers == {("ViT-L-14-quickgelu", "dfn2b", 70, "bf16"), ("ViT-L-14", "dfn2b_s39b", 60, "bf16")}
    (captioner,) = config.captioners.values()
    assert open_clip.get_pretrained_cfg(captioner.model, captioner.pretrained)
    assert (captioner.captions, captioner.top_p, captioner.max_length) == (5, 0.9, 77)
    for teacher in config.teachers.values():
        assert open_clip.get_pretrained_cfg(teacher.model, teacher.pretrained)
    assert (config.workers.min, config.workers.max, config.workers.gpus, config.workers.cpus) == (8, 512, 1, 12)


@pytest.mark.parametrize(
    ("name", "count", "captions", "scales"),
    [
        ("dfndr2b", 2, "syn_text_dfn_mscoco38k", {70, 60}),
        ("dfndr12m", 30, "syn_text_dfn_mscoco38k", {70, 60}),
        ("dfndr12m-bf16", 30, "syn_text_dfn_mscoco38k", {70, 60}),
        ("datacompdr12m", 30, "syn_text", {100}),
        ("datacompdr1b", 10, "syn_text", {100}),
    ],
)
def test_configs_of_published_sets_name_what_their_cards_and_scripts_show(
    name: str, count: int, captions: str, scales: set[float]
) -> None:
    config = load_config(ROOT / f"configs/{name}.yaml")
    assert config.augmentations.count == count
    assert [(one.model, one.captions) for one in config.captioners.values()] == [(captions, 5)]
    assert [one.columns for one in config.teachers.values()] == [(0, 768), (768, 1536)]
    assert {one.logit_scale for one in config.teachers.values()} == scales
    source, published = (
        [url.split("/", 4)[-1] for url in expand(urls)] for urls in (config.source, config.reinforcements or "")
    )
    assert len(source) == len(published)
    assert [url.split("/")[-2:] for url in source][-1][-1] == published[-1].split("/")[-1]


RECIPES = {
    "vit-b-16-datacompdr12m": ("ViT-B-16", 1.0, [100, 100], 30_000, 8192, 1e-6, None),
    "vit-b-16-datacompdr1b": ("ViT-B-16", 0.75, [100, 100], 200_000, 65536, 1e-6, None),
    "mobileclip-b-lt-datacompdr1b": ("MobileCLIP-B", 0.75, [100, 100], 600_000, 65536, 1e-8, 299_000),
    "mobileclip-b-dfndr12m": ("MobileCLIP-B", 1.0, [70, 60], 30_000, 8192, 1e-8, None),
    "mobileclip-b-dfndr2b": ("MobileCLIP-B", 1.0, [70, 60], 200_000, 65536, 1e-8, None),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_trainings_have_the_values_of_the_published_scripts(name: str) -> None:
    config = settings.load(StudentConfig, ROOT / f"configs/recipes/{name}.yaml")
    optimizer, compute = config.train.optimizer, config.train.compute
    found = (config.student.model, config.loss.lambda_, [*config.loss.logit_scales.values()])
    assert (*found, config.train.steps, config.train.batch, optimizer.eps, optimizer.hold) == RECIPES[name]
    assert (optimizer.lr, optimizer.final_lr, optimizer.warmup, optimizer.betas) == (1e-3, 0, 1000, (0.9, 0.95))
    assert (optimizer.weight_decay, optimizer.grad_clip_norm, config.seed) == (0.2, 1.0, 0)
    assert (config.data.captions, config.data.pick, compute.gradient_checkpointing) == ("both", "random", True)
    assert config.train.batch // compute.ranks == (256 if config.train.batch == 8192 else 512)
    [source] = config.data.datasets
    labels = load_config(ROOT / f"configs/{name.rpartition('-')[2]}.yaml")
    assert labels.output == source.url
    assert [*labels.teachers] == config.data.teachers
    assert [*labels.captioners] == [*config.data.captioners]
    assert {name: spec.logit_scale for name, spec in labels.teachers.items()} == config.loss.logit_scales


@pytest.mark.parametrize("size", ["s0", "s2"])
def test_recipes_of_adaptations_have_the_values_of_flyp(size: str) -> None:
    config = settings.load(AdaptConfig, ROOT / f"configs/recipes/adapt-mobileclip2-{size}.yaml")
    assert open_clip.get_pretrained_cfg(config.released.model, config.released.pretrained)
    train = training_config(config, Domain("", "", {}, ("a", "b"), False, ()), 5000).train
    assert (train.batch, train.steps, train.optimizer.lr, train.optimizer.weight_decay) == (512, 98, 1e-5, 0.1)


def test_the_recipe_of_the_labels_has_the_values_of_the_published_generator() -> None:
    found = {path.stem for path in ROOT.glob("configs/recipes/*.yaml") if not path.stem.startswith(("coca-", "adapt-"))}
    assert found == {*RECIPES, "dfndr-labels"}, "every recipe is compared with its script"
    config = load_config(ROOT / "configs/recipes/dfndr-labels.yaml")
    augmentations, [captioner] = config.augmentations, config.captioners.values()
    assert (augmentations.count, augmentations.size, augmentations.scale) == (2, 224, (0.08, 1.0))
    assert (augmentations.rand_augment.ops, augmentations.rand_augment.magnitude) == (2, 9)
    assert (captioner.strategy, captioner.captions, captioner.top_p, captioner.temperature) == ("nucleus", 5, 0.9, 1.0)
    defaults = inspect.signature(CoCa.generate).parameters
    lengths = tuple(defaults[name].default for name in ("min_seq_len", "seq_len"))
    assert (captioner.min_length, captioner.max_length) == lengths
    assert captioner.clean.first_sentence
    assert captioner.clean.drop == ()
    assert [(spec.precision, spec.logit_scale) for spec in config.teachers.values()] == [("fp32", 70), ("fp32", 60)]
