"""Fine-tuning of a captioner: its config, notes, metrics, resumption, and the model in open_clip and in a run."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import yaml
from safetensors.torch import load_file

from reinforce import settings
from reinforce.captioning.config import CaptionerConfig, Evaluation
from reinforce.captioning.finetune import build, finetune, format_comparison
from reinforce.cli import main
from reinforce.training.results import Results
from teachers.coca.captioner import CocaCaptioner
from teachers.runtime.accelerator import Accelerator
from tests.helpers.captioning import captioned, captioner_config, write_shards
from tests.helpers.data import picture, write_tar
from tests.helpers.models.tiny_coca import coca_model
from tests.helpers.specs import captioner_spec

CONFIGS = sorted(Path(__file__).parents[2].glob("configs/finetune-*.yaml"))
PRETRAINED = Path(__file__).parents[2] / "configs/recipes/coca-dfn2b.yaml"
PUBLISHED = [path for path in CONFIGS if path.stem != "finetune-demo"]
PUBLISHED += sorted(set(Path(__file__).parents[2].glob("configs/recipes/coca-*.yaml")) - {PRETRAINED})


def test_the_published_pre_training_sees_13_billion_samples_of_streams() -> None:
    config = settings.load(CaptionerConfig, PRETRAINED)
    assert config.train.steps is not None
    assert config.train.steps * config.train.batch == pytest.approx(13e9, rel=1e-5)
    assert config.train.batch % config.train.compute.ranks == 0
    assert (config.loss.contrastive, config.loss.caption) == (1, 2)
    longer = settings.load(CaptionerConfig, PRETRAINED, ["captioner.context=256"])
    assert longer.captioner.context == 256


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_recipes_have_the_published_values_and_two_overrides_give_open_clips(path: Path) -> None:
    config = settings.load(CaptionerConfig, path)
    train = config.train
    assert (config.loss.contrastive, config.loss.caption) == (1, 2)
    assert train.steps is not None
    assert train.steps * train.batch == 12_000_000
    optimizer = train.optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.warmup, train.batch) == (1e-5, 0.1, 1000, 128)
    loss = settings.load(CaptionerConfig, path, ["loss.contrastive=0", "loss.caption=1"]).loss
    assert (loss.contrastive, loss.caption) == (0, 1)


STEPS = 12


def make_config(folder: Path, output: str = "out", **train: Any) -> CaptionerConfig:
    base = captioner_config(folder).train.model_dump()
    return captioner_config(folder, output=f"{folder}/{output}", train={**base, "steps": STEPS, **train})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("finetuned")
    write_shards(folder, 20, 20, captions=2)
    return folder, finetune(make_config(folder))


def test_fine_tuning_lowers_the_caption_loss_on_held_out_images(trained: tuple[Path, Results]) -> None:
    folder, results = trained
    lines = {line.split()[0]: line.split() for line in format_comparison(results).splitlines()}
    before, after = float(lines["caption_loss"][1]), float(lines["caption_loss"][3])
    assert after < before - 1
    assert after == pytest.approx(results.metrics["caption_loss"], abs=1e-4)
    assert (folder / "out" / "curves.png").stat().st_size > 10_000


def test_the_fine_tuned_model_loads_in_open_clip_and_captions_as_in_a_run(trained: tuple[Path, Results]) -> None:
    folder, _ = trained
    name = f"local-dir:{folder}/out/captioner"
    model, preprocess = open_clip.create_model_from_pretrained(name)
    start = open_clip.create_model(f"local-dir:{folder}/model")
    assert isinstance(model, open_clip.CoCa)
    assert tuple(preprocess.transforms[-1].mean) == (0.5, 0.4, 0.3)
    assert open_clip.get_tokenizer(name)("fog").shape == (1, 76)
    changed = [not torch.equal(value, start.state_dict()[key]) for key, value in model.state_dict().items()]
    assert sum(changed) / len(changed) > 0.9
    captioner = CocaCaptioner(captioner_spec(model=name, captions=2, max_length=8), Accelerator("cpu"))
    [texts] = captioner.caption(torch.rand(1, 3, 32, 32), np.zeros((1, 2), np.uint64))
    assert texts is not None
    assert len(texts) == 2


def test_the_command_prints_metrics_before_and_after_and_refuses_another_config(
    trained: tuple[Path, Results], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = trained
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make_config(folder).model_dump(mode="json")))
    with pytest.raises(SystemExit) as ended:
        main(["finetune-captioner", str(path)])
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert "before and after" in output
    assert f"weights: {folder}/out/captioner" in output
    with pytest.raises(SystemExit):
        main(["finetune-captioner", str(path), "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads((folder / "out" / "results.json").read_text())
    with pytest.raises(SystemExit):
        main(["finetune-captioner", str(path), "--set", "loss.contrastive=0.0"])
    assert "loss.contrastive: 1.0 before, 0.0 now" in capsys.readouterr().err


def test_the_best_evaluated_captioner_is_exported_where_the_config_asks(trained: tuple[Path, Results]) -> None:
    """Of a finished fine-tuning, without further steps."""
    assert Evaluation().best_metric == "cider"
    assert Evaluation(captioned=0).best_metric == "token_accuracy"
    folder, _ = trained
    shutil.copytree(folder / "out", folder / "best")
    best = {"step": STEPS - 2, "metric": "cider", "value": 1.5}
    (folder / "best" / "checkpoints" / "best.json").write_text(json.dumps(best))
    config = make_config(folder, output="best")
    results = finetune(config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"export": "best"})}))
    assert (results.exported, results.steps) == (STEPS - 2, STEPS)
    checkpoint = load_file(folder / "best" / "checkpoints" / f"step-{STEPS - 2:09d}.safetensors")
    exported = load_file(folder / "best" / "captioner" / "open_clip_model.safetensors")
    assert exported
    assert all(torch.equal(value, checkpoint[f"model/coca.{name}"]) for name, value in exported.items())


def test_user_errors_are_reported_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path, 20)
    coca_model(tmp_path / "model")

    def fault(*overrides: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(make_config(tmp_path).model_dump(mode="json")))
        with pytest.raises(SystemExit) as ended:
            main(["finetune-captioner", str(path), *(part for text in overrides for part in ("--set", text))])
        assert ended.value.code == 2
        assert not (tmp_path / "out" / "checkpoints").exists()
        return capsys.readouterr().err

    assert "is not a CoCa" in fault("captioner.model=ViT-B-32")
    assert "known keys here: model, pretrained, freeze" in fault("captioner.frozen=[image]")
    assert "both weights are 0" in fault("loss.contrastive=0", "loss.caption=0")
    assert "give either `source` or `share`" in fault("held_out.source=x")
    assert "want one of cider, bleu, token_accuracy" in fault("evaluate.best=caption_loss")
    assert "evaluate.generate: max_length" in fault("evaluate.generate.min_length=9")
    assert "evaluate.generate.max_length: max_length 90 exceeds the 77" in fault("evaluate.generate.max_length=90")
    if not torch.cuda.is_available():
        assert "error: train.compute.gpus: device 'cuda:0'" in fault("train.compute.gpus=1")
    assert "data: crop: want 0 < low" in fault("data.crop=[0.9, 1.1]")
    assert "nothing is left to train" in fault("captioner.freeze=[image, text, decoder]")
    assert "nothing is left to train" in fault("captioner.freeze=[image, text]", "loss.caption=0")
    assert "images are held out" in fault("held_out.share=1.0e-9")


def test_notes_describe_parameters_data_and_truncated_captions(tmp_path: Path) -> None:
    write_shards(tmp_path, 4)
    members = [captioned({str(i): picture(i)}, "word " * (74 + (i > 0))) for i in range(3)]
    write_tar(tmp_path / "held" / "0.tar", [*itertools.chain(*members)])
    data = {"source": f"{tmp_path}/shards/*.tar", "captions": ["txt"], "workers": 0}
    config = captioner_config(tmp_path, data=data, held_out={"source": f"{tmp_path}/held/0.tar"})
    task, _ = build(config, Accelerator("cpu"))
    parameters, data, truncated = task.notes
    assert "M parameters are trained (image " in parameters
    assert data == "training on 4 examples in 1 group of streams; 3 images with 3 captions held out (held-out.parquet)"
    assert truncated == "2 of 3 held-out captions are longer than the model's context and truncated"
