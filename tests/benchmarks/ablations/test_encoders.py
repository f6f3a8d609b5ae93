"""The image encoders of four and five stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.ablations import encoders
from benchmarks.ablations.encoders import Encoder
from benchmarks.ablations.measures import MILLISECONDS, MILLISECONDS_ALONE
from benchmarks.ablations.questions import STAGES
from reinforce.student.pointwise import avoid_faulty_convolutions
from teachers.open_clip.teacher import random_model
from tests.helpers.demo import ROOT


@pytest.mark.parametrize("encoder", STAGES, ids=lambda encoder: encoder.name)
def test_an_encoder_has_its_stages_widths_and_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: Encoder
) -> None:
    monkeypatch.chdir(ROOT)
    stages, size = len(encoder.blocks), encoder.size
    encoder.write(tmp_path)
    clip = random_model(encoder.model(tmp_path))
    avoid_faulty_convolutions(clip)
    trunk = clip.visual.trunk
    assert [len(stage.blocks) for stage in trunk.stages] == list(encoder.blocks)
    assert [stage["num_chs"] for stage in trunk.feature_info] == [encoder.width * 2**i for i in range(stages)]
    with torch.inference_mode():
        assert clip.encode_image(torch.zeros(2, 3, size, size)).shape == (2, 96)
        x = trunk.forward_features(torch.zeros(1, 3, size, size))
    assert x.shape[-1] == size // 2 ** (stages + 1)


def test_milliseconds_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(encoders, "_ROUNDS", 2)
    small, large = Encoder((1, 1, 1, 1), 16, 32), Encoder((1, 1, 1, 1), 16, 64)
    encoders.prepare([small, large], tmp_path)
    times = encoders.read_milliseconds(small, tmp_path), encoders.read_milliseconds(large, tmp_path)
    assert 0 < times[0][MILLISECONDS] < times[1][MILLISECONDS]
    assert all(one[MILLISECONDS] < one[MILLISECONDS_ALONE] for one in times)
    stored = small.folder(tmp_path) / "milliseconds.json"
    stored.write_text(json.dumps({MILLISECONDS: 1.0, MILLISECONDS_ALONE: 2.0}))
    encoders.prepare([small, large], tmp_path)
    assert encoders.read_milliseconds(small, tmp_path) == {MILLISECONDS: 1.0, MILLISECONDS_ALONE: 2.0}
