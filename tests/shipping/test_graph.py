"""ONNX files of towers, in onnxruntime."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from reinforce.shipping import graph


class Scale(torch.nn.Module):
    """Multiply by a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows * self.factor


def scale_tower(factor: float) -> graph.Tower:
    return graph.Tower("image", "images", Scale(factor), lambda count: torch.rand(count, 4))


def test_large_weights_are_stored_in_a_separate_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "EXTERNAL_DATA_BYTES", 1000)
    linear = torch.nn.Linear(40, 30)
    tower = graph.Tower("image", "images", linear, lambda count: torch.rand(count, 40))
    graph.write_onnx(tower, tmp_path / "image.onnx", {})
    assert (tmp_path / "image.onnx.data").stat().st_size >= 40 * 30 * 4
    (tmp_path / "image.onnx").rename(tmp_path / "moved.onnx")  # the graph does not depend on its own name
    assert graph.largest_difference(tmp_path / "moved.onnx", linear, [torch.rand(3, 40)]) < 1e-5


def test_graph_has_metadata_and_a_dynamic_batch_size(tmp_path: Path) -> None:
    graph.write_onnx(scale_tower(2.0), tmp_path / "image.onnx", {"model": "a model"})
    written = onnx.load(str(tmp_path / "image.onnx"))
    assert (written.producer_name, [(p.key, p.value) for p in written.metadata_props]) == (
        "reinforce",
        [("model", "a model")],
    )
    run = graph.load_session(tmp_path / "image.onnx", threads=1)
    for count in (1, 5):
        rows = torch.rand(count, 4)
        torch.testing.assert_close(run(rows), 2 * rows)


def test_largest_difference_is_infinite_where_a_number_is_not_finite(tmp_path: Path) -> None:
    graph.write_onnx(scale_tower(2.0), tmp_path / "image.onnx", {})
    rows = torch.ones(2, 4)
    assert graph.largest_difference(tmp_path / "image.onnx", lambda x: 2 * x + 0.5, [rows]) == pytest.approx(0.5)
    assert graph.largest_difference(tmp_path / "image.onnx", lambda x: 2 * x / 0, [rows]) == float("inf")
    assert graph.largest_difference(tmp_path / "image.onnx", lambda x: x[:, :3], [rows]) == float("inf")
