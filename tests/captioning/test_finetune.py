from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import open_clip
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from reinforce.captioning.config import CaptionerConfig
from reinforce.captioning.finetune import comparison, finetune
from reinforce.cli import main
from reinforce.errors import UserError
from reinforce.training.results import Results
from tests.helpers.captioning import captioner_config, write_shards
from tests.helpers.reinforced import reinforce_here
from tests.helpers.tiny_coca import coca_model

STEPS = 12


def config_of(folder: Path, output: str = "out", **train: Any) -> CaptionerConfig:
    base = captioner_config(folder).train.model_dump()
    return captioner_config(
        folder, output=f"{folder}/{output}", train={**base, "steps": STEPS, **train}, data=_data(folder)
    )


def _data(folder: Path) -> dict[str, Any]:
    return {"source": f"{folder}/shards/*.tar", "threads": 1}


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("finetuned")
    write_shards(folder, 20, 20, captions=2)
    return folder, finetune(config_of(folder))


def test_what_was_held_out_is_told_better_afterwards(trained: tuple[Path, Results]) -> None:
    folder, results = trained
    told = {line.split()[0]: line.split() for line in comparison(results).splitlines()}
    before, after = float(told["caption_loss"][1]), float(told["caption_loss"][3])
    assert after < before - 1
    assert after == pytest.approx(results.metrics["caption_loss"], abs=1e-4)
    assert (folder / "out" / "curves.png").stat().st_size > 10_000


def test_the_result_loads_in_open_clip(trained: tuple[Path, Results]) -> None:
    folder, _ = trained
    name = f"local-dir:{folder}/out/captioner"
    model, preprocess = open_clip.create_model_from_pretrained(name)
    start = open_clip.create_model(f"local-dir:{folder}/model")
    assert isinstance(model, open_clip.CoCa)
    assert tuple(preprocess.transforms[-1].mean) == (0.5, 0.4, 0.3)
    assert open_clip.get_tokenizer(name)("fog").shape == (1, 76)
    changed = [not torch.equal(value, start.state_dict()[key]) for key, value in model.state_dict().items()]
    assert sum(changed) / len(changed) > 0.9


def test_the_result_captions_in_a_run(trained: tuple[Path, Results]) -> None:
    folder, _ = trained
    dataset = reinforce_here(
        {
            "source": f"{folder}/shards/*.tar",
            "output": f"{folder}/dataset",
            "augmentations": {"size": 8},
            "captioners": {"ours": {"model": f"local-dir:{folder}/out/captioner", "captions": 2, "max_length": 8}},
        }
    )
    tables = [pq.read_table(path) for path in sorted(Path(dataset, "captions", "ours").glob("*.parquet"))]
    assert [table.num_rows for table in tables] == [20, 20]
    assert all(len(texts) == 2 for table in tables for texts in table["captions"].to_pylist())


def test_a_killed_fine_tuning_goes_on_as_if_nothing_had_been(trained: tuple[Path, Results], tmp_path: Path) -> None:
    folder, _ = trained
    config = config_of(folder, output="killed")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    job = Path(__file__).parents[2] / "jobs" / "finetune_captioner.py"
    command = [sys.executable, str(job), "--config", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        checkpoints = folder / "killed" / "checkpoints"
        deadline = time.monotonic() + 120
        while not list(checkpoints.glob("step-*.safetensors")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (folder / "killed" / "results.json").exists()
    results = finetune(config)
    assert losses(folder / "killed") == losses(folder / "out")
    assert results.metrics == trained[1].metrics
    weights = [
        (folder / output / "captioner" / "open_clip_model.safetensors").read_bytes() for output in ("killed", "out")
    ]
    assert weights[0] == weights[1]


def test_the_command_line_ends_with_before_and_after(
    trained: tuple[Path, Results], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = trained
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config_of(folder).model_dump(mode="json")))
    with pytest.raises(SystemExit) as ended:
        main(["finetune-captioner", str(path)])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert "before and after" in told
    assert f"weights: {folder}/out/captioner" in told


def test_another_course_is_refused(trained: tuple[Path, Results]) -> None:
    folder, _ = trained
    config = config_of(folder)
    other = config.model_copy(update={"loss": config.loss.model_copy(update={"contrastive": 0.0})})
    with pytest.raises(UserError, match=r"loss\.contrastive: 1\.0 before, 0\.0 now"):
        finetune(other)


def test_faults_are_told_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path, 20)
    coca_model(tmp_path / "model")

    def fault(*overrides: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config_of(tmp_path).model_dump(mode="json")))
        with pytest.raises(SystemExit) as ended:
            main(["finetune-captioner", str(path), *(part for text in overrides for part in ("--set", text))])
        assert ended.value.code == 2
        assert not (tmp_path / "out" / "checkpoints").exists()
        return capsys.readouterr().err

    assert "is not a CoCa" in fault("captioner.model=ViT-B-32")
    assert "has no weights without `pretrained`" in fault("captioner.model=coca_ViT-B-32")
    assert "known keys here: model, pretrained, freeze" in fault("captioner.frozen=[image]")
    assert "both weights are 0" in fault("loss.contrastive=0", "loss.caption=0")
    assert "give either `source` or `share`" in fault("held_out.source=x")
    assert "want one of cider, bleu, token_accuracy" in fault("evaluate.best=caption_loss")
    assert "evaluate.generate: max_length" in fault("evaluate.generate.min_length=9")
    assert "exceeds the 77 tokens" in fault("evaluate.generate.max_length=90")
    assert "data.crop: want 0 < low" in fault("data.crop=[0.9, 1.1]") or "want 0 < low" in fault("data.crop=[0.9,1.1]")
    assert "images are held out" in fault("held_out.share=1.0e-9")
