"""Probabilities of classes, from the config to the reader, on images without captions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import timm
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from safetensors.torch import save_file

import reinforce
from reinforce.config import parse_config
from reinforce.dataset import vectors
from reinforce.dataset.kinds.probabilities import ClassProbabilities, read
from reinforce.dataset.kinds.registry import KINDS
from reinforce.dataset.layers import Layer
from reinforce.dataset.store import Store
from reinforce.dataset.validate import validate
from reinforce.engine.check_models import check_class, check_config
from reinforce.engine.plan.plan import build_layers, describe_models, make_plan
from reinforce.engine.preflight.estimate import expected_bytes
from reinforce.engine.recompute import recompute
from reinforce.engine.worker.inference import Session
from reinforce.engine.worker.models import load_models
from reinforce.engine.worker.producers.registry import check_models, make_producers
from reinforce.engine.worker.self_test import precisions
from reinforce.errors import UserError
from teachers.fit import fit
from tests.helpers.commands import printed_by
from tests.helpers.data import picture
from tests.helpers.models.classifiers import NAMES, Colors
from tests.helpers.reinforced import reinforce_here

CLASSIFIERS = "tests.helpers.models.classifiers"
CROPS, WHOLE = "probabilities/crops", "probabilities/whole"
SAMPLES, RECORDS = 5, 3


def config_with(folder: Path, **classifiers: dict[str, Any]) -> dict[str, Any]:
    """A config of images without text and these classifiers alone."""
    images = folder / "images"
    if not images.exists():
        images.mkdir()
        for number in range(SAMPLES):
            (images / f"{number}.png").write_bytes(picture(number))
    return {
        "source": str(images),
        "output": str(folder / "out"),
        "augmentations": {"count": RECORDS, "size": 16},
        "classifiers": {name: {"class": f"{CLASSIFIERS}:Colors", **keys} for name, keys in classifiers.items()},
        "workers": {"batch": 6, "max": 1},
    }


def expected(image: Image.Image, temperature: float, **options: Any) -> np.ndarray:
    """Probabilities of all classes of an image."""
    pixels = np.asarray(fit(image, Colors.image), np.float32).transpose(2, 0, 1) / 255
    logits = Colors(torch.device("cpu"), **options).classify(torch.from_numpy(pixels)[None])
    return np.asarray(torch.softmax(logits / temperature, dim=1)[0])


def test_the_most_likely_classes_of_images_without_text_are_stored_and_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.chdir(tmp_path)
    first = config_with(tmp_path, crops={"k": 2})
    Path("run.yaml").write_text(yaml.safe_dump(first))
    assert CROPS in printed_by(capfd, "plan", "run.yaml")
    assert expected_bytes(make_plan(parse_config(first)))[CROPS] == SAMPLES * RECORDS * (2 * 6 + 4)
    url = reinforce_here(first)
    config = config_with(tmp_path, crops={"k": 2}, whole={"k": 6, "sees": "image", "temperature": 2.0})
    assert [shard.layers for shard in make_plan(parse_config(config)).pending] == [(WHOLE,)]
    [file] = Path(url, CROPS).iterdir()
    before = file.read_bytes()
    reinforce_here(config)
    assert make_plan(parse_config(config)).pending == []

    samples = list(reinforce.open(url))
    assert [sample.caption for sample in samples] == [None] * SAMPLES
    for sample in samples:
        crops, whole = sample.values[CROPS], sample.values[WHOLE]
        assert [part.shape for part in crops[:3]] == [(RECORDS, 2), (RECORDS, 2), (RECORDS,)]
        for k in range(RECORDS):
            every = expected(sample.augmented(k), 1.0)
            assert [*crops.classes[k]] == [*np.argsort(-every)[:2]]
            np.testing.assert_allclose(crops.values[k], np.sort(every)[:-3:-1], atol=1e-3)
            np.testing.assert_allclose(crops.rest[k], np.sort(every)[:-2].sum(), atol=1e-3)
        every = expected(sample.pil(), 2.0)
        np.testing.assert_allclose(whole.values[0], np.sort(every)[::-1], atol=1e-3)
        assert [*whole.rest] == [0]
    assert {*next(iter(reinforce.open(url, classifiers=["wh*"]))).values} == {WHOLE}
    assert "classifiers: crops, whole" in repr(reinforce.open(url))
    with pytest.raises(UserError, match="has no classifier 'other'; it has: crops, whole"):
        reinforce.open(url, classifiers=["other"])
    with pytest.raises(UserError, match="unexpected keyword argument 'classifier'"):
        reinforce.open(url, classifier=["crops"])

    entry = json.loads(Path(url, "dataset.json").read_text())["layers"][CROPS]
    assert {key: entry[key] for key in ("count", "top", "dim", "temperature", "sees", "names")} == {
        "count": RECORDS, "top": 2, "dim": 6, "temperature": 1.0, "sees": "crops", "names": [*NAMES]
    }  # fmt: skip
    assert "[3, 2] of 6 classes" in printed_by(capfd, "status", url)
    assert validate(url).findings == []
    found = recompute(parse_config(config), url, SAMPLES).layers
    assert [*found] == [CROPS, WHOLE]
    assert all((one.rows, one.equal, one.fits) == (SAMPLES, SAMPLES, True) for one in found.values())
    printed_by(capfd, "inspect", url, "report")
    shown = Path("report", "index.html").read_text()
    assert "crops, 3 × the 2 most likely of 6 classes" in shown
    assert "<td>classifier</td>" in shown
    card = printed_by(capfd, "publish", "card", url) and Path(url, "README.md").read_text()
    assert "| `probabilities--crops` | 5 | 1 |" in card
    assert f"| whole | {CLASSIFIERS}:Colors |" in card.replace("\\", "")
    assert "depends on samples" not in printed_by(capfd, "drop", url, CROPS, "--yes")
    assert [shard.layers for shard in make_plan(parse_config(config)).pending] == [(CROPS,)]
    reinforce_here(config)
    assert file.read_bytes() == before


@pytest.mark.usefixtures("worker_in_process")
def test_a_row_with_nan_logits_is_null_and_quarantined(tmp_path: Path) -> None:
    config = config_with(tmp_path, crops={"k": 6, "options": {"nan_below": 0.2}}, whole={"sees": "image", "k": 1})
    assert reinforce.run(config).status == 0
    url = config["output"]
    samples = {sample.key: sample for sample in reinforce.open(url)}
    dark = {
        key
        for key, sample in samples.items()
        if any(np.isnan(expected(sample.augmented(k), 1.0, nan_below=0.2)).any() for k in range(RECORDS))
    }
    assert 0 < len(dark) < SAMPLES
    assert {key for key, sample in samples.items() if sample.values[CROPS] is None} == dark
    [shard] = reinforce.open(url).shards
    rows = list(Store(url).quarantined(CROPS, shard))
    assert {row["key"] for row in rows} == dark
    assert {(row["reason"], row["detail"]) for row in rows} == {("not_finite", "crops returned NaN or infinity")}
    assert all(sample.values[WHOLE] is not None for sample in samples.values())
    assert validate(url).findings == []
    assert reinforce.run(config).shards == 0


def test_a_model_of_timm_is_loaded_with_the_weights_of_a_file_and_its_own_preprocessing(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t.c3_in1k", num_classes=7)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    spec = {"model": "resnet10t.c3_in1k", "pretrained": str(tmp_path / "weights.safetensors"), "k": 3}
    config = {**config_with(tmp_path), "classifiers": {"net": {**spec, "options": {"num_classes": 7}}}}
    assert [row.dim for row in check_config(parse_config(config)).rows] == [7]
    plan = make_plan(parse_config(config))
    assert plan.notes == ["precision: fp32 for net (auto: workers use CPUs)"]
    url = reinforce_here(config)
    assert validate(url).findings == []
    loaded = load_models(plan.config, plan.layers.values()).loaded["classifiers"]["net"]
    assert (loaded.image.size, loaded.image.interpolation) == (176, "bicubic")
    pixels = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.classify(pixels), model.eval()(pixels))
    other = {**config, "classifiers": {"net": {**spec, "options": {"num_classes": 8}}}}
    with pytest.raises(UserError, match=r"(?s)made by another config.*net.*num_classes: 7 in the dataset, 8 in"):
        make_plan(parse_config(other))
    with pytest.raises(UserError, match=r"classifier net: the weights in .* do not fit resnet10t.c3_in1k: .*fc.weight"):
        load_models(parse_config(other), plan.layers.values())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"class": f"{CLASSIFIERS}:Unsized"}, r"Unsized must set `classes`, their number, got None"),
        ({"class": f"{CLASSIFIERS}:Misshapen"}, r"crops fails its self-test \(probabilities\): logits must be .* 12\)"),
        ({"k": 7}, "classifiers.crops: it has 6 classes: set `k` to at most 6"),
        ({"class": "tests.helpers.models:ColorTeacher"}, r"has no method `classify\(pixels\)`"),
        ({"class": None, "model": "s3:net"}, r"classifiers\.crops: model: use a name of timm, hf-hub:"),
        (
            {"class": None, "model": "resnt10t"},
            r"crops: timm .* has no model resnt10t; near names: resnet10t",
        ),
        ({"class": None, "model": "net", "precision": "fp8"}, "set bf16 or auto"),
        ({"class": "Colors"}, "must be package.module:Class"),
        ({"pretrained": "x.pt"}, "`pretrained` belongs to `model`"),
        ({"temperature": 0.0}, r"classifiers\.crops\.temperature: Input should be greater than or equal to 0\.001"),
        ({"sees": "views"}, r"classifiers\.crops\.sees"),
    ],
)
def test_a_classifier_that_does_not_work_is_one_clear_error(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    def check() -> None:
        config = parse_config(config_with(tmp_path, crops={"k": 2, **keys}))
        layers = [*build_layers(config, describe_models(config)).values()]
        models = load_models(config, layers)
        check_models(models, layers, precisions(config))
        make_producers(layers, Session(config, models))

    with pytest.raises(UserError, match=message):
        check()


def test_a_class_with_classify_is_checked_as_a_classifier() -> None:
    report = check_class(f"{CLASSIFIERS}:Colors", {})
    assert [(row.model, row.side, row.dim) for row in report.rows] == [("Colors", "images", 6)]
    assert report.errors == []


def layer_of(rows: int, top: int, dim: int) -> tuple[Layer, pa.Table]:
    """A layer of one record with a right table of some rows."""
    entry = {"kind": "probabilities", "fingerprint": "", "classifier": "x", "count": 1, "top": top, "dim": dim}
    layer = KINDS["probabilities"].stored("probabilities/x", {**entry, "temperature": 1, "sees": "crops", "model": {}})
    classes = np.tile(np.arange(top, dtype=np.int32), (rows, 1, 1))
    values = np.tile(np.linspace(0.2, 0.1, top, dtype=np.float16), (rows, 1, 1))
    return layer, table_of(layer, classes, values, 1 - values.astype(np.float32).sum(axis=2))


def table_of(layer: Layer, classes: np.ndarray, values: np.ndarray, rest: np.ndarray) -> pa.Table:
    valid = np.ones(len(rest), bool)
    columns = [vectors.tensor_column(one, [*one.shape[1:]], valid) for one in (classes, values, rest)]
    keys = pa.array([str(row) for row in range(len(rest))])
    return pa.table([keys, *columns], schema=layer.schema(""))


@pytest.mark.parametrize(
    ("column", "place", "value", "message"),
    [
        ("values", (1, 0, 0), 1.5, "have a probability that is not between 0 and 1"),
        ("values", (1, 0, 2), -0.1, "have a probability that is not between 0 and 1"),
        ("values", (1, 0, 0), np.nan, "have a probability that is not between 0 and 1"),
        ("rest", (1, 0), 0.1, "have probabilities whose sum is not 1"),
        ("values", (1, 0, 2), 0.3, "do not have the most likely class first"),
        ("classes", (1, 0, 0), 5, "have a class that is not one of 5"),
        ("classes", (1, 0, 0), -1, "have a class that is not one of 5"),
        ("classes", (1, 0, 0), 2, "have a class twice"),
    ],
)
def test_rows_that_no_classifier_gives_are_found(
    column: str, place: tuple[int, ...], value: float, message: str
) -> None:
    layer, table = layer_of(3, 3, 5)
    found = {name: np.array(getattr(read(table), name)) for name in ("classes", "values", "rest")}
    assert all(not wrong.any() for _, wrong in layer.kind.wrong_rows(layer, table, None))
    found[column][place] = value
    changed = table_of(layer, found["classes"], found["values"].astype(np.float16), found["rest"])
    wrong = {what: [*rows] for what, rows in layer.kind.wrong_rows(layer, changed, None)}
    assert wrong[message] == [False, True, False]


def test_rows_that_are_no_distribution_are_not_trained_on() -> None:
    layer, table = layer_of(6, 2, 5)
    found = {name: np.array(getattr(read(table), name)) for name in ("classes", "values", "rest")}
    found["values"][0], found["values"][1, 0, 0], found["rest"][2] = 0, np.nan, 1e38
    found["rest"][0], found["values"][3, 0] = 0, (1.5, -0.5)
    found["rest"][3] = 0
    changed = table_of(layer, found["classes"], found["values"].astype(np.float16), found["rest"])
    picked = layer.kind.pick(changed, np.zeros(6, np.intp))
    assert [*picked.usable] == [False] * 4 + [True] * 2
    assert picked.stored.all()


def test_files_of_another_shape_than_dataset_json_states_are_found() -> None:
    layer, _ = layer_of(2, 3, 5)
    _, other = layer_of(2, 2, 5)
    [(message, wrong)] = layer.kind.wrong_rows(layer, other, None)
    assert "have classes of type" in message
    assert wrong.all()
    stated = {"classifier": "x", "count": 1, "top": 1, "dim": 5, "temperature": 1, "sees": "crops", "model": {}}
    stated["fingerprint"] = ""
    layer.kind.stored(layer.name, stated)
    temperatures = [("temperature", wrong) for wrong in (0, True, 1e300, float("nan"))]
    forged: list[tuple[str, Any]] = [("top", 6), ("top", True), *temperatures]
    for key, value in (*forged, ("classifier", 1), ("model", "x"), ("sees", [])):
        with pytest.raises(ValueError, match=f"{key} must be"):
            layer.kind.stored(layer.name, {**stated, key: value})


@given(arrays.arrays(np.float32, (4, 6), elements=st.floats(-9, 9, width=32)), st.integers(1, 6))
def test_stored_cells_keep_the_probabilities_and_compare_as_themselves(logits: np.ndarray, top: int) -> None:
    every = np.asarray(torch.softmax(torch.from_numpy(logits), dim=1))
    order = np.argsort(-every, axis=1, kind="stable")
    sorted_ = np.take_along_axis(every, order, axis=1)
    layer, _ = layer_of(1, top, 6)
    table = table_of(
        layer,
        order[:, None, :top].astype(np.int32),
        sorted_[:, None, :top].astype(np.float16),
        sorted_[:, top:].sum(axis=1, keepdims=True),
    )
    assert all(not wrong.any() for _, wrong in layer.kind.wrong_rows(layer, table, None))
    (classes, values, rest), stored, usable = layer.kind.pick(table, np.full(4, 7))  # there is one cell, of the whole
    np.testing.assert_allclose(np.take_along_axis(every, classes, axis=1), values, atol=1e-3)
    np.testing.assert_allclose(values.sum(axis=1) + rest, 1, atol=1e-3)
    assert stored.all()
    assert usable.all()
    same = ClassProbabilities().compare(table, table)
    assert (same.rows, same.equal, same.nulls, same.difference, same.cosine) == (4, 4, 0, 0.0, 1.0)
    reversed_ = ClassProbabilities().compare(table, table.take([3, 2, 1, 0]))
    cells = np.concatenate([order, sorted_.astype(np.float16)], axis=1)  # as they are stored
    assert reversed_.equal == sum(bool((cells[row] == cells[3 - row]).all()) for row in range(4)) or top < 6
    assert reversed_.cosine is not None
    assert -1e-3 <= reversed_.cosine <= 1 + 1e-3
