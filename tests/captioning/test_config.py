from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from reinforce.captioning.config import CaptionerConfig, load_captioner_config

CONFIGS = sorted(Path(__file__).parents[2].glob("configs/finetune-*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_recipes_are_configs(path: Path) -> None:
    config = load_captioner_config(path)
    assert config.loss.contrastive == 1
    assert config.loss.caption == 2
    again = CaptionerConfig.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))))
    assert again == config


@pytest.mark.parametrize("name", ["coco38k", "docci"])
def test_the_published_recipes_have_the_published_numbers(name: str) -> None:
    config = load_captioner_config(next(path for path in CONFIGS if path.stem == f"finetune-{name}"))
    optimizer = config.train.optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.warmup, config.train.batch) == (1e-5, 0.1, 1000, 128)


def test_open_clips_recipe_is_two_overrides_away() -> None:
    path = next(path for path in CONFIGS if path.stem == "finetune-coco38k")
    loss = load_captioner_config(path, ["loss.contrastive=0", "loss.caption=1"]).loss
    assert (loss.contrastive, loss.caption) == (0, 1)


def test_the_best_metric_is_one_that_is_measured() -> None:
    path = next(path for path in CONFIGS if path.stem == "finetune-demo")
    assert load_captioner_config(path).evaluate.best_metric == "cider"
    assert load_captioner_config(path, ["evaluate.captioned=0"]).evaluate.best_metric == "token_accuracy"
