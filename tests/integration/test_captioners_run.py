"""Captioners of both libraries in one run, with and without `clean`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import reinforce
from reinforce.cli import main
from reinforce.config import Limits
from reinforce.seeds import seed_for
from reinforce.source.image import decode
from teachers.fitting import fit
from teachers.pixels import to_pixels
from teachers.registry import load_captioner
from teachers.spec import CaptionerSpec
from tests.helpers import tiny_captioners
from tests.helpers.data import config_of
from tests.helpers.tiny_coca import coca_model

pytestmark = pytest.mark.usefixtures("ray_session")


def test_captioners_of_two_libraries_write_layers_of_one_dataset(shards: Callable[..., str], tmp_path: Path) -> None:
    blip = {"family": "transformers", "model": tiny_captioners.blip(tmp_path / "blip"), "captions": 3, "max_length": 9}
    coca = {"model": coca_model(tmp_path / "coca"), "captions": 2, "max_length": 12, "clean": {"characters": 20}}
    config = config_of(shards(6, 3), tmp_path / "out", captioners={"blip": blip, "coca": coca})
    del config["teachers"]["blue"]
    summary = reinforce.run(config)
    assert summary.status == 0
    assert summary.cleaned["coca"]["captions"] == 2 * 9
    assert summary.cleaned["coca"]["cut"] > 0
    assert "blip" not in summary.cleaned, "counted only with `clean`"

    captioner = load_captioner("blip", CaptionerSpec.model_validate(blip), "cpu")
    rows = list(reinforce.open(str(tmp_path / "out")))
    assert len(rows) == 9
    for sample in rows:
        pixels = to_pixels(torch.tensor(fit(_rgb(sample.image), captioner.image)[None]), captioner.image)
        seeds = np.array([[seed_for(0, sample.key, "captions/blip", n) for n in range(3)]], np.uint64)
        assert [sample.captions["blip"]] == captioner.caption(pixels, seeds)
        short = sample.captions["coca"]
        assert short is not None
        assert len(short) == 2
        assert all(0 < len(text) <= 20 for text in short)
        assert sample.texts["red"]["blip"].shape == (3, 8)
        assert sample.texts["red"]["coca"].shape == (2, 8)


def _rgb(encoded: bytes) -> Image.Image:
    return decode(encoded, Limits())


def test_dropped_captions_are_not_stored_and_are_counted_in_summary_events_and_status(
    shards: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captioner = {"class": "tests.helpers.models:RepetitiveCaptioner", "captions": 3, "clean": {"first_sentence": True}}
    config = config_of(shards(20), tmp_path / "out", captioners={"stammerer": captioner})
    summary = reinforce.run(config)
    keys = [f"{number:08d}" for number in range(20)]
    bad = [key for key in keys if seed_for(0, key, "captions/stammerer", 0) % 4 == 0]
    assert len(bad) == 5
    counts = {"captions": 60, "cut": 15, "repetitive": 15 + 3 * 5, "null_rows": 5}
    assert summary.cleaned == {"stammerer": counts}
    assert summary.refused == {"no_text": 5 + 2 * 5}, "in the captions layer and in both layers of its embeddings"
    line = "captions by stammerer: 60 captions, 15 cut, 30 repetitive, 5 null rows"
    assert line in summary.text("x")

    for sample in reinforce.open(str(tmp_path / "out")):
        vectors = sample.texts["red"]["stammerer"]
        if sample.key in bad:
            assert sample.captions["stammerer"] is None
            assert np.isnan(vectors).all()
        else:
            assert sample.captions["stammerer"] == ["good", "longer.", "good"]
            np.testing.assert_array_equal(vectors[0], vectors[2])
    [refused] = (tmp_path / "out" / "quarantine" / "captions" / "stammerer").glob("*.parquet")
    assert [(r["key"], r["reason"]) for r in pq.read_table(refused).to_pylist()] == [(key, "no_text") for key in bad]
    [event] = [e for e in _events(tmp_path / "out") if e["event"] == "shard"]
    assert event["cleaned"] == {"stammerer": counts}
    with pytest.raises(SystemExit):
        main(["status", str(tmp_path / "out")])
    assert line in capsys.readouterr().out


def _events(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for part in output.glob("runs/*/events-*.jsonl") for line in part.read_text().splitlines()]
