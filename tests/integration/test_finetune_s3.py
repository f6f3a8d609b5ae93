"""A fine-tuning that reads from and writes to an object store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from reinforce.captioning.config import CaptionerConfig
from reinforce.captioning.finetune import finetune
from tests.helpers.captioning import captioner_config, write_shards


def make_config(folder: Path, source: str, output: str, steps: int = 4) -> CaptionerConfig:
    train = {**captioner_config(folder).train.model_dump(), "steps": steps}
    return captioner_config(folder, data={"source": source, "threads": 2}, output=output, train=train)


def read_losses(lines: bytes) -> list[float]:
    return [row["loss"] for row in map(json.loads, lines.splitlines()) if "loss" in row]


def test_an_object_store_gives_the_results_of_a_local_disk(s3: Any, tmp_path: Path) -> None:
    write_shards(tmp_path, 20, 20)
    s3.put(f"{tmp_path}/shards/", "bucket/pairs/", recursive=True)
    local = finetune(make_config(tmp_path, f"{tmp_path}/shards/*.tar", f"{tmp_path}/out"))
    remote = finetune(make_config(tmp_path, "s3://bucket/pairs/{00000..00001}.tar", "s3://bucket/out"))
    assert remote.metrics == pytest.approx(local.metrics)
    assert read_losses(s3.cat_file("bucket/out/log.jsonl")) == read_losses(
        (tmp_path / "out" / "log.jsonl").read_bytes()
    )
    weights = "captioner/open_clip_model.safetensors"
    assert s3.cat_file(f"bucket/out/{weights}") == (tmp_path / "out" / weights).read_bytes()
    with s3.open("bucket/out/pairs.parquet") as file:
        assert set(pq.read_table(file)["url"].to_pylist()) == {f"s3://bucket/pairs/0000{i}.tar" for i in range(2)}
