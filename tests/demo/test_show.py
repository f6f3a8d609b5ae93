"""The view of a dataset."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from reinforce.demo.show import show_dataset
from reinforce.errors import UserError
from tests.helpers.reinforced import small_dataset


def test_show_prints_layers_and_a_sample_and_writes_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show_dataset(small_dataset(tmp_path, (3,)), tmp_path / "report")
    printed = capsys.readouterr().out
    for text in ("samples/", "captions/namer/", "embeddings/red/images/", "00000000", "thing 0 of shard 0"):
        assert text in printed
    assert "[2, 8] float16, mean norm 1.000" in printed
    assert len(re.findall(r"resized to 24 x 24", printed)) == 2
    assert "looked at 3 of 3 samples" in printed
    assert "thing 2 of shard 0" in (tmp_path / "report" / "gallery.html").read_text()


def test_show_without_a_dataset_names_the_command_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape("reinforce run configs/demo.yaml")):
        show_dataset(tmp_path, tmp_path / "report")
