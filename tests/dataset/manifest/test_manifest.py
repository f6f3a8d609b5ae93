"""dataset.json: what is kept, what is added, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import schemas
from reinforce.config import Config, parse_config
from reinforce.dataset.files.store import MANIFEST, Store
from reinforce.dataset.kinds.registry import KINDS
from reinforce.dataset.layers import Layer
from reinforce.dataset.manifest.manifest import read_manifest, record_scales, scale_notes, update_manifest
from reinforce.errors import UserError
from tests.helpers.data import config_of

RECIPE = {"model": "m", "seed": 0}
LAYERS = {
    layer.name: layer
    for layer in (
        Layer("samples", KINDS["samples"], "a", recipe={"seed": 0, "images": "embed"}),
        Layer("captions/namer", KINDS["captions"], "b", model="namer", count=2, recipe=RECIPE),
        Layer("embeddings/red/images", KINDS["images"], "c", model="red", count=2, recipe=RECIPE),
        Layer("embeddings/red/caption", KINDS["texts"], "d", model="red", texts="caption", count=1, recipe=RECIPE),
    )
}


def config_with(**red: Any) -> Config:
    return parse_config(
        config_of("s.tar", "out", teachers={"red": {"class": "tests.helpers.models:ColorTeacher", **red}})
    )


def updated(old: dict[str, Any] | None = None, loaded: dict[str, Any] | None = None, **red: Any) -> dict[str, Any]:
    """The manifest after a run with the teacher ``red``."""
    models = {("teachers", name): stated for name, stated in (loaded or {}).items()}
    return update_manifest(old, config_with(**red), LAYERS, models)


def test_the_manifest_of_a_first_run_has_the_recipe_the_models_and_every_layer() -> None:
    manifest = updated(loaded={"red": {"dim": 8, "logit_scale": 30.0, "image": {"size": 16}}})
    assert [*manifest.pop("layers")] == [*LAYERS], "whose entries are those of tests/golden"
    scale = {"logit_scale": 30.0, "logit_scale_from": "model"}
    assert manifest == {
        "format": "reinforced-dataset",
        "schema_version": schemas.SCHEMA_VERSION,
        "seed": 0,
        "images": "embed",
        "teachers": {"red": {"model": "m", **scale, "dim": 8, "image": {"size": 16}}},
        "captioners": {"namer": {"model": "m"}},
    }


def test_layers_of_other_configs_and_what_only_a_loaded_model_has_are_kept() -> None:
    first = updated(loaded={"red": {"dim": 8, "logit_scale": 30.0, "image": {"size": 16}}})
    first["teachers"]["blue"], first["layers"]["embeddings/blue/images"] = {"dim": 12}, {"kind": "images"}
    assert updated(first) == first


def test_a_tuned_scale_is_kept_until_the_config_names_another_and_a_run_logs_which_is_used() -> None:
    tuned = record_scales(updated(logit_scale=50), {"red": 43.0}, "tuned by a")
    assert tuned["teachers"]["red"]["logit_scale_tuned"] == {"config": 50.0, "before": 50.0, "before_from": "config"}
    assert updated(tuned, logit_scale=50) == updated(tuned) == tuned
    replaced = updated(tuned, logit_scale=55)["teachers"]["red"]
    assert (replaced["logit_scale"], replaced["logit_scale_from"]) == (55.0, "config")
    assert "logit_scale_tuned" not in replaced
    again = record_scales(tuned, {"red": 47.0}, "tuned by b")["teachers"]["red"]
    assert (again["logit_scale"], again["logit_scale_tuned"]["before"]) == (47.0, 50.0), "not the first tuned one"
    loaded = {"red": {"dim": 8, "logit_scale": 30.0}}
    assert updated(tuned, loaded)["teachers"]["red"]["logit_scale"] == 43.0, "the model's own does not replace it"
    for scale, notes in {
        None: [],
        43: ["teacher red: logit scale 43 of this config replaces 43 (tuned by a)"],
        50: ["teacher red: logit scale 43 (tuned by a) stays in use, not the 50 of this config"],
        55: ["teacher red: logit scale 55 of this config replaces 43 (tuned by a)"],
    }.items():
        found = scale_notes(tuned, config_with(logit_scale=scale))
        assert [note.partition(", which")[0] for note in found] == notes


def test_a_manifest_of_a_newer_version_is_an_error(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_json({"schema_version": schemas.SCHEMA_VERSION + 1}, MANIFEST)
    with pytest.raises(UserError, match="newer version"):
        read_manifest(store)
