"""``reinforce latency`` as it is typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from reinforce.cli import main
from reinforce.model_names import resolve_models
from reinforce.shipping.latency import measure
from reinforce.shipping.report import Latencies
from reinforce.shipping.towers import reparameterised
from tests.helpers import shipping as models
from tests.helpers.students import student_folder
from tests.helpers.tiny_coca import coca_model

Told = Callable[..., tuple[int, str, str]]


@pytest.fixture
def latency(capfd: pytest.CaptureFixture[str]) -> Told:
    """Run the command -> (exit status, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["latency", *arguments])
        code = ended.value.code
        return (code if isinstance(code, int) else 0), *capfd.readouterr()

    return run


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_architectures_stand_side_by_side(latency: Told, tmp_path: Path, threads: None) -> None:
    vit = student_folder(tmp_path / "runs" / "student")  # without weights, where a training leaves them
    fast = models.fastvit(tmp_path / "fast", weights=False)
    status, out, _ = latency(
        f"{tmp_path}/runs", fast, "--rounds", "5", "--threads", "1", "--json", f"{tmp_path}/out/found.json"
    )
    assert status == 0
    for told in ("parameters, M", "GFLOP", "image, ms", "1.0x", "1 of ", "medians of 5 rounds by the wall clock"):
        assert told in out
    found = json.loads((tmp_path / "out" / "found.json").read_text())
    assert (found["threads"], found["rounds"], found["batch"]) == (1, 5, 1)
    assert found["cpu"]
    assert found["versions"]["torch"] == torch.__version__
    assert list(found["models"]) == [f"{tmp_path}/runs", fast]
    for name, about in zip((vit, fast), found["models"].values(), strict=True):
        clip = open_clip.create_model(name, load_weights=False)
        shipped = sum(parameter.numel() for parameter in reparameterised(clip).visual.parameters())
        whole = sum(parameter.numel() for parameter in clip.parameters()) - 1  # the logit scale
        before = sum(parameter.numel() for parameter in clip.visual.parameters())
        assert about["parameters"] == {"image": shipped, "text": whole - before, "total": shipped + whole - before}
        for side in ("image", "text"):
            times = about["milliseconds"]["torch"][side]
            assert 0 < times["fastest"] <= times["lower quartile"] <= times["median"] <= times["upper quartile"]


def test_operations_are_those_of_the_matrix_products(tmp_path: Path) -> None:
    with resolve_models([student_folder(tmp_path)], weights=False) as specs:
        (about,) = measure(specs, rounds=1).models.values()
    width, layers, patches, length = 32, 2, 16, 16

    def blocks(tokens: int) -> int:
        products = tokens * width * (3 * width + width + 4 * width + 4 * width)  # queries to values, out, the MLP
        return layers * 2 * (products + 2 * tokens * tokens * width)

    patching, projecting = 2 * patches * width * 3 * 8 * 8, 2 * width * 16
    assert about["gflop"]["image"] * 1e9 == pytest.approx(blocks(patches + 1) + patching + projecting)
    assert about["gflop"]["text"] * 1e9 == pytest.approx(blocks(length) + projecting)


def test_onnxruntime_stands_beside_torch(tmp_path: Path) -> None:
    with resolve_models([student_folder(tmp_path)], weights=False) as specs:
        found = measure(specs, rounds=2, onnx=True, clock="process")
    (about,) = found.models.values()
    assert {runtime: set(sides) for runtime, sides in about["milliseconds"].items()} == {
        "torch": {"image", "text"},
        "onnxruntime": {"image", "text"},
    }
    assert "onnxruntime" in found.about["versions"]
    assert "process clock" in found.line()
    assert found.table().row_count == 2


def test_the_slowest_line_is_what_others_are_compared_with() -> None:
    def model(image: float, text: float) -> dict[str, Any]:
        times = {"image": image, "text": text}
        ranges = {
            side: {"median": t, "lower quartile": t, "upper quartile": t + 1, "fastest": t} for side, t in times.items()
        }
        sizes = {"image": 2_000_000, "text": 1_000_000}
        return {"parameters": sizes, "gflop": {"image": 1.0, "text": 2.0}, "milliseconds": {"torch": ranges}}

    table = Latencies({}, {"slow": model(8.0, 2.0), "fast": model(2.0, 2.0)}).table()
    columns = [list(column.cells) for column in table.columns]
    assert columns == [
        ["slow", "fast"],
        ["2.0 + 1.0"] * 2,
        ["1.0 + 2.0"] * 2,
        ["8.0 ±0.5", "2.0 ±0.5"],
        ["2.0 ±0.5"] * 2,
        ["1.0x", "2.5x"],
    ]


def test_what_cannot_be_measured_is_told(latency: Told, tmp_path: Path) -> None:
    for model, told in {
        "hf-hub:nobody/nothing": "its architecture is not on this machine",
        "MobileCLIP2-S5": "did you mean MobileCLIP2-S",
        coca_model(tmp_path / "coca"): "it is a captioner",
    }.items():
        status, _, err = latency(model)
        assert (status, told in err) == (2, True)


def test_the_documentation_shows_what_was_measured() -> None:
    root = Path(__file__).parents[2]
    found = json.loads((root / "benchmarks" / "results" / "latency.json").read_text())
    rows = [line.strip("| ").split(" | ") for line in (root / "docs" / "latency.md").read_text().splitlines()]
    table = {row[0]: row for row in rows if row[0] in found["models"]}
    assert list(table) == list(found["models"])
    slowest = found["models"]["ViT-L-14"]["milliseconds"]["torch"]
    for model, about in found["models"].items():
        times = about["milliseconds"]["torch"]
        image, text = (times[side]["median"] for side in ("image", "text"))
        assert [cell.split()[0] for cell in table[model][3:5]] == [f"{image:.1f}", f"{text:.1f}"]
        both = slowest["image"]["median"] + slowest["text"]["median"]
        assert table[model][5:] == [f"{slowest['image']['median'] / image:.1f}", f"{both / (image + text):.1f}"]
