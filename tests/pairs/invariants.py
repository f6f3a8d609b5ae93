"""What must be true of every run, whatever its case. Nothing here depends on how a case was made."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

import reinforce
from reinforce.config import parse_config
from reinforce.dataset.codecs.codebooks import find_codec, load
from reinforce.dataset.kinds.registry import stored_layer
from reinforce.dataset.layers import SAMPLES, Layer, inputs_of, model_of
from reinforce.dataset.validate import validate
from reinforce.dataset.vectors import normalized
from reinforce.engine.recompute import recompute
from reinforce.errors import UserError
from schemas import Reason
from teachers.fit import fit
from teachers.pixels import to_pixels
from tests.helpers.decoding import decode_pool
from tests.helpers.pages_commands import check_names
from tests.pairs.runs import Run, files_of

_LIMIT = 2_000  # characters of a caption
_SPACES = dict.fromkeys(range(32), " ")  # in place of control characters


def read(run: Run, **options: Any) -> list[Any]:
    """The samples by `reinforce.open`."""
    return [*reinforce.open(run.url, images_from=[run.root], **options)]


def rows_of(run: Run) -> list[Any]:
    """The samples by `reinforce.open` of a run that has ended, which are read once for all invariants."""
    run.rows = run.rows or read(run)
    return run.rows


def rows_are_accounted_for(run: Run) -> None:
    """Each sample of the source is a row with its captions, or refused alone and with a reason."""
    rows, refused = Counter[Any](), Counter[str]()
    for sample in rows_of(run):
        texts = sample.true_captions or ((sample.caption,) if sample.caption is not None else ())
        rows[(_name(sample.key), *map(_plain, texts))] += 1
    store = run.store
    for shard in store.shards(f"quarantine/{SAMPLES}"):
        refusals = [row for row in store.quarantined(SAMPLES, shard) if Reason(row["reason"]) != Reason.NO_TEXT]
        assert all(row["detail"] for row in refusals)
        refused.update({_name(row["key"] or "") for row in refusals})
    expected, lost, strays = Counter[Any](), Counter[str](), 0
    for one in (one for samples in run.samples for one in samples):
        strays += one.stray
        if one.data is not None and one.data.startswith((b"\x89PNG", b"\xff\xd8")):
            expected[(one.key, *dict.fromkeys(map(_plain, one.captions)))] += 1
        else:
            lost[one.key] += 1
    assert (expected - rows, rows - expected) == (Counter(), Counter()), "rows are missing, and others are there"
    if run.case["format"] == "dataset":  # its samples are rows already
        lost = Counter()
    assert lost <= refused, "by their keys"
    assert refused.total() == lost.total() + strays, refused


def nothing_is_found_by_validate(run: Run) -> None:
    found = validate(run.url, [run.root], count=True, processes=1)
    run.messages += found.lines()
    assert [*found.errors, *found.changed] == [], [*found.lines()]
    assert bool(found.repeated.keys) == (run.case["resume"] == "exchanged")


def a_changed_dataset_json_is_refused(run: Run) -> None:
    """The scale of a teacher's logits, which no file but dataset.json has."""
    kept = files_of(run.url)["dataset.json"]
    changed = json.loads(kept)
    changed["teachers"]["red"]["logit_scale"] = 31.0
    run.write({"dataset.json": json.dumps(changed).encode()})
    with pytest.raises(UserError, match=r"dataset\.json is not as it was written"):
        read(run)
    run.write({"dataset.json": kept})


def another_run_gives_the_same_bytes(run: Run) -> None:
    before = files_of(run.url)
    if run.other is not None:
        other = files_of(run.other)
        assert before.keys() == other.keys()
        differing = {name: (before[name], other[name]) for name in before if before[name] != other[name]}
        manifests = differing.pop("dataset.json", (b"{}", b"{}"))  # in the order in which layers came
        assert json.loads(manifests[0]) == json.loads(manifests[1])
        if run.case["resume"] == "changed":  # a list of files has the sizes that they had first
            differing = {name: of for name, of in differing.items() if not name.startswith("lists/")}
        assert differing == {}
    run.compute()
    assert files_of(run.url) == before, "a run of a complete dataset writes nothing"


def models_give_again_what_is_stored(run: Run) -> None:
    """`reinforce validate --recompute`, of layers of every kind."""
    found = recompute(parse_config(run.config()), run.url, 4, pool=decode_pool())
    layers = {layer for layer in run.store.read_json("dataset.json")["layers"] if layer != SAMPLES}
    assert (found.left_out, {*found.layers}) == ([], layers) or run.case["images"] == "reference", found.left_out
    assert [finding.message for finding in found.findings()] == []


def values_are_those_of_the_models(run: Run) -> None:
    """What is read is what the models compute of the replayed images and of the texts; a row is null if they cannot."""
    manifest = run.store.read_json("dataset.json")
    layers = {name: stored_layer(name, entry) for name, entry in manifest["layers"].items()}
    reasons = {
        name: {
            row["key"] for shard in run.store.shards(f"quarantine/{name}") for row in run.store.quarantined(name, shard)
        }
        for name in layers
    }
    compared = Counter[str]()
    for sample in rows_of(run):
        for name, layer in layers.items():
            direct = DIRECT.get(layer.kind.name)
            if direct is None:
                continue
            stored, computed = direct(run, layer, sample)
            if computed is None:
                assert stored is None, (name, sample.key)
                assert sample.key in reasons[name], f"{name}: {sample.key} is null without a reason"
            else:
                assert stored is not None, (name, sample.key)
                for one, (other, tolerance) in zip(stored, computed, strict=True):
                    np.testing.assert_allclose(one, other, rtol=0, atol=tolerance, err_msg=f"{name}: {sample.key}")
            compared[name] += 1
    assert compared.total() or not layers.keys() - {SAMPLES}


def examples_are_what_is_stored(run: Run) -> None:
    """`reinforce.Examples` has each usable sample once, with the vectors of its own image and texts."""
    spec = run.case
    texts = {} if spec["captions"] != "none" else {"captions": "none"}
    captioners = [] if texts or spec["kind"] != "captions" else ["namer"]
    samples = [
        sample
        for sample in rows_of(run)
        if np.isfinite(sample.images["red"]).all()
        and (texts or (sample.caption is not None and np.isfinite(sample.texts["red"]["caption"]).all()))
        and all(np.isfinite(sample.texts["red"][name]).all() for name in captioners)
    ]
    if not samples:
        return
    examples = reinforce.Examples(
        run.url, teachers=["red"], captioners=captioners, images_from=[run.root], seed=3, **texts
    )
    examples.set_epoch(0)
    assert len(examples) == len(samples)
    found = [examples[number] for number in range(len(examples))]
    assert Counter(one["key"] for one in found) == Counter(sample.key for sample in samples)
    of_keys: dict[str, list[Any]] = {}
    for sample in samples:
        of_keys.setdefault(sample.key, []).append(sample)
    for one in found:
        targets = one["targets"]["red"]
        image = one["image"].permute(1, 2, 0).numpy()
        own = [
            (sample, k)
            for sample in of_keys[one["key"]]
            for k in range(2)
            if np.array_equal(np.asarray(sample.augmented(k)), image)
        ]
        assert own, f"{one['key']}: not an image of the sample"
        stored = [normalized(sample.images["red"][k]) for sample, k in own]
        assert min(np.abs(targets["image"].numpy() - one).max() for one in stored) < 2e-3
        for kind in ("caption", *(["synthetic"] if captioners else [])) if not texts else ():
            name = "caption" if kind == "caption" else "namer"
            known = {
                text: normalized(vector)
                for sample in of_keys[one["key"]]
                for text, vector in zip(
                    (sample.true_captions or (sample.caption,)) if kind == "caption" else sample.captions["namer"],
                    sample.texts["red"][name],
                    strict=False,
                )
            }
            assert np.abs(targets[kind].numpy() - known[one[kind]]).max() < 2e-3, (one["key"], kind)


def printed_commands_exist(run: Run) -> None:
    for text in run.messages:
        for command in re.findall(r"`((?:reinforce|make|pip|python) [^`]+)`", text):
            program, *words = shlex.split(command)
            check_names(program, [word for word in words if not word.startswith("<")])


INVARIANTS: tuple[Callable[[Run], None], ...] = (
    rows_are_accounted_for,
    nothing_is_found_by_validate,
    a_changed_dataset_json_is_refused,
    another_run_gives_the_same_bytes,
    models_give_again_what_is_stored,
    values_are_those_of_the_models,
    examples_are_what_is_stored,
    printed_commands_exist,
)

# -- What a model computes, without the code of runs.

#: Stored and computed arrays of a row, each with the largest difference; None for a row that is null.
Compared = tuple[list[Any] | None, list[tuple[Any, float]] | None]


def _name(key: str) -> str:
    return key.rpartition("/")[2]


def _plain(text: str) -> str:
    start = text[: 2 * _LIMIT].translate(_SPACES)
    return " ".join(start.split())[:_LIMIT].rstrip()


def _model(run: Run, layer: Layer) -> Any:
    """The model of a layer, made anew."""
    entry = run.config()[str(layer.kind.section)][model_of(layer.name)]
    module, _, name = (entry.get("class") or "").partition(":")
    return getattr(importlib.import_module(module), name)(torch.device("cpu"), **entry.get("options", {}))


def _crops(sample: Any, spec: Any) -> torch.Tensor:
    crops = [np.asarray(sample.augmented(k)) for k in range(len(sample.augmentations))]
    return to_pixels(torch.from_numpy(np.stack(crops)), spec)


def _whole(sample: Any, spec: Any) -> torch.Tensor:
    return to_pixels(torch.from_numpy(fit(sample.pil(), spec).copy())[None], spec)


def _vectors(run: Run, layer: Layer, stored: Any, direct: Any) -> Compared:
    """Vectors [n, D] that are read, and those that a codec keeps of what a model computes."""
    codec = find_codec(layer.dtype)
    known = None if stored is None or not np.isfinite(stored).all() else stored
    if direct is None:
        return known, None
    values = codec.prepare(np.asarray(direct, np.float32))
    if not np.isfinite(values).all() or not values.any(axis=1).all():
        return known, None
    if layer.codebook is None:
        error = {"float32": 1e-5, "float16": 1e-3, "int8": np.abs(values).max() / 254 + 1e-3}[codec.numbers]
        return known if known is None else [known], [(values, error)]
    book = load(layer.codebook_at(run.url))  # type: ignore[arg-type]
    nearest = normalized(book.decode(book.encode(values)))
    errors = [np.linalg.norm(normalized(values) - of, axis=1) for of in (nearest, known)] if known is not None else []
    return None if known is None else [errors[1]], [(np.zeros(len(values)), float(errors[0].max()) + 5e-3)]


def _images(run: Run, layer: Layer, sample: Any) -> Compared:
    model = _model(run, layer)
    return _vectors(run, layer, sample.images[layer.model], model.encode_images(_crops(sample, model.image)))


def _texts(run: Run, layer: Layer, sample: Any) -> Compared:
    name, model = inputs_of(layer.name), _model(run, layer)
    true = [*(sample.true_captions or ((sample.caption,) if sample.caption else ()))]
    texts = true if name == "caption" else sample.captions[name]
    return _vectors(run, layer, sample.texts[layer.model][name], model.encode_texts(texts) if texts else None)


def _captions(run: Run, layer: Layer, sample: Any) -> Compared:
    model = _model(run, layer)
    texts = sample.captions[layer.model]
    mean = float(_whole(sample, model.image).mean())
    return texts and [[float(re.findall(r"-?[\d.]+(?=,)", text)[0]) for text in texts]], [([mean] * layer.count, 2e-3)]


def _probabilities(run: Run, layer: Layer, sample: Any) -> Compared:
    model, found = _model(run, layer), sample.values[layer.name]
    names = run.store.read_json("dataset.json")["layers"][layer.name]["names"]
    direct = model.classify(_crops(sample, model.image)).softmax(dim=1).numpy()
    of_names = [[list(model.names).index(names[one]) for one in crop] for crop in found.classes]
    values = np.take_along_axis(direct, np.array(of_names), axis=1)
    return [found.values, found.rest], [(values, 2e-3), (1 - values.sum(axis=1), 4e-3)]


def _patches(run: Run, layer: Layer, sample: Any) -> Compared:
    model, grids = _model(run, layer), sample.values[layer.name]
    direct = model.encode_patches(_crops(sample, model.image)).numpy()
    book = load(layer.codebook_at(run.url))  # type: ignore[arg-type]
    stored = np.stack([grids[crop] for crop in range(len(direct))])
    return [stored], [(book.decode(book.encode(direct)), 2e-2)]


def _scores(run: Run, layer: Layer, sample: Any) -> Compared:
    found = sample.values[layer.name]
    if layer.name == "scores/size":
        return [[found["width"], found["bytes"]]], [([sample.width, len(sample.image)], 0)]
    pixels = _whole(sample, _model(run, layer).image)
    return [[found["red"], found["blue"]]], [(pixels.mean(dim=(2, 3))[0, ::2], 1e-3)]


#: What models compute, by the name of a kind. Layers of others are compared by `reinforce validate --recompute` alone.
DIRECT: Mapping[str, Callable[[Run, Layer, Any], Compared]] = {
    "images": _images, "texts": _texts, "captions": _captions, "probabilities": _probabilities, "patches": _patches,
    "scores": _scores,
}  # fmt: skip
