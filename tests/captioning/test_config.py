from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from reinforce.captioning.config import CaptionerConfig, load_captioner_config
from reinforce.errors import UserError
from tests.helpers.captioning import captioner_config

CONFIGS = sorted(Path(__file__).parents[2].glob("configs/finetune-*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_example_configs_are_valid(path: Path) -> None:
    config = load_captioner_config(path)
    assert config.loss.contrastive == 1
    assert config.loss.caption == 2
    again = CaptionerConfig.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))))
    assert again == config


@pytest.mark.parametrize("name", ["coco38k", "docci"])
def test_published_recipes_have_the_published_values(name: str) -> None:
    config = load_captioner_config(next(path for path in CONFIGS if path.stem == f"finetune-{name}"))
    optimizer = config.train.optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.warmup, config.train.batch) == (1e-5, 0.1, 1000, 128)


def test_two_overrides_give_open_clips_recipe() -> None:
    path = next(path for path in CONFIGS if path.stem == "finetune-coco38k")
    loss = load_captioner_config(path, ["loss.contrastive=0", "loss.caption=1"]).loss
    assert (loss.contrastive, loss.caption) == (0, 1)


def test_the_default_best_metric_is_one_that_is_computed() -> None:
    path = next(path for path in CONFIGS if path.stem == "finetune-demo")
    assert load_captioner_config(path).evaluate.best_metric == "cider"
    assert load_captioner_config(path, ["evaluate.captioned=0"]).evaluate.best_metric == "token_accuracy"


@pytest.mark.parametrize(
    ("freeze", "loss"),
    [(["image", "text", "decoder"], {}), (["image", "text"], {"contrastive": 1, "caption": 0})],
)
def test_a_config_without_trainable_towers_is_refused(tmp_path: Path, freeze: list[str], loss: dict) -> None:
    with pytest.raises(UserError, match="nothing is left to train"):
        captioner_config(tmp_path, captioner={"model": f"local-dir:{tmp_path}/model", "freeze": freeze}, loss=loss)
