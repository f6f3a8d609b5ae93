"""dataset.json: what is kept, added and refused, and what differs from a config that does not fit, for every layer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import reinforce
import schemas
from reinforce.config import Config, parse_config
from reinforce.dataset.drop import plan_drop
from reinforce.dataset.kinds.registry import KINDS
from reinforce.dataset.layers import Layer
from reinforce.dataset.manifest import read_manifest, record_scales, scale_notes, update_manifest
from reinforce.dataset.status import read_status
from reinforce.dataset.store import MANIFEST, Store
from reinforce.dataset.validate import validate
from reinforce.engine.plan.plan import make_plan
from reinforce.errors import UserError
from reinforce.source.config import Limits
from tests.helpers.data import config_of
from tests.helpers.models.tiny_models import open_clip_model
from tests.helpers.reinforced import config_for as config
from tests.helpers.reinforced import manifest_to_change, small_dataset
from tests.helpers.views import make_view
from tests.student.data.test_reader import feed_of, read_epoch

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


def refusal(config: dict[str, Any]) -> list[str]:
    """The lines of the error for a config."""
    with pytest.raises(UserError) as caught:
        make_plan(parse_config(config))
    return str(caught.value).splitlines()


def teachers(**changes: Any) -> dict[str, Any]:
    """The teachers of the dataset, with changes of ``red``."""
    known: dict[str, Any] = config_of("", "")["teachers"]
    return {**known, "red": {**known["red"], **changes}}


def test_a_changed_seed_is_named_once_with_the_number_of_layers_that_follow_from_it(made: Path) -> None:
    changed = config(made, seed=3)
    layers = make_plan(parse_config({**changed, "output": f"{made}-new"})).layers
    recorded = json.loads((made / "dataset.json").read_text())["layers"]
    lines = refusal(changed)
    assert lines[0] == f"{made} was made by another config, and the results would be mixed:"
    before, now = recorded["samples"]["fingerprint"], layers["samples"].fingerprint
    assert lines[1:-1] == [
        f"  samples: fingerprint {before} in the dataset, {now} in this config",
        "    seed: 0 in the dataset, 3 in this config",
        "  7 more layers (captions/namer, embeddings/red/images, embeddings/red/caption, ...) computed from what "
        "differs",
    ]
    assert "write to another `output`, or delete" in lines[-1]
    assert lines[-1].endswith(f": reinforce drop {made} '*'")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"images": "reference"}, 'images: "embed" in the dataset, "reference" in this config'),
        (
            {"augmentations": {"count": 2, "size": 24, "rand_augment": {"ops": 1}}},
            "augmentations.rand_augment.ops: 2 in the dataset, 1 in this config",
        ),
        (
            {"input": {"limits": Limits(pixels=9)}},
            "input.limits.pixels: 89478485 in the dataset, 9 in this config",
        ),
        ({"input": {"limits": Limits(scans=9)}}, "input.limits.scans: 500 in the dataset, 9 in this config"),
        (
            {"input": {"captions": ["txt"]}},
            'input.captions: ["txt", "json:caption"] in the dataset, ["txt"] in this config',
        ),
        ({"teachers": teachers(codec="int8")}, 'dtype: "float16" in the dataset, "int8" in this config'),
        (
            {"teachers": teachers(options={"size": 16, "dim": 8, "seed": 4})},
            "options.seed: not set in the dataset, 4 in this config",
        ),
        ({"teachers": teachers(options={"size": 16})}, "options.dim: 8 in the dataset, not set in this config"),
    ],
)
def test_what_differs_is_named(made: Path, changes: dict[str, Any], line: str) -> None:
    lines = refusal(config(made, **changes))
    assert [text for text in lines if text.startswith("    ")] == [f"    {line}"]


def test_the_command_of_a_changed_captioner_names_the_layers_that_depend_on_its_captions(made: Path) -> None:
    one = {"namer": {"class": "tests.helpers.models:SeedCaptioner", "options": {"captions": 1}}}
    lines = refusal(config(made, captioners=one, teachers={}))
    assert {line.strip() for line in lines} >= {
        "captions: 2 in the dataset, 1 in this config",
        "options.captions: not set in the dataset, 1 in this config",
    }
    assert lines[-1].endswith(f": reinforce drop {made} embeddings/blue/namer embeddings/red/namer captions/namer")


def test_every_changed_model_is_in_one_message(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.helpers.models import ColorTeacher

    both = teachers(codec="int8")
    both["blue"] = {**both["blue"], "options": {"size": 24, "dim": 12, "seed": 2}}
    text = "\n".join(refusal(config(made, teachers=both)))
    assert re.search(
        r'dtype: "float16" in the dataset, "int8" in this config\n  2 more.*\n  embeddings/blue/images', text
    )
    assert "options.seed: 1 in the dataset, 2 in this config" in text
    assert (
        f"give the changed model another name, or delete these layers and compute them again: reinforce drop {made} "
        in text
    )
    monkeypatch.setattr(ColorTeacher, "version", 7, raising=False)
    assert refusal(config(made)).count("    version: not set in the dataset, 7 in this config") == 1, "once for both"


def test_weights_tokenizers_and_precision_are_named(tmp_path: Path) -> None:
    model = open_clip_model(tmp_path / "vit", image_size=24, width=32, embed_dim=16, seed=0)
    small_dataset(tmp_path, (2,), teachers={"vit": {"model": model}}, captioners={})
    again = config(tmp_path / "out", teachers={"vit": {"model": model, "precision": "bf16"}}, captioners={})
    assert '    precision: "fp32" in the dataset, "bf16" in this config' in refusal(again)
    folder = Path(model.removeprefix("local-dir:"))
    open_clip_model(folder, image_size=24, width=32, embed_dim=16, seed=1)
    (folder / "tokenizer_config.json").write_text("{}")
    again["teachers"]["vit"]["precision"] = "fp32"
    keys = [line.strip().split(": ")[0] for line in refusal(again) if line.startswith("    ")]
    weights = [key for key in keys if key.endswith((".safetensors", ".bin", ".pt"))]
    assert len(weights) == 1
    assert "files.tokenizer_config.json" in keys


def test_a_difference_that_the_manifest_does_not_explain_is_named_and_a_missing_layer_is_checked_by_a_footer(
    made: Path, dataset: Path
) -> None:
    manifest = manifest_to_change(dataset)
    entry = manifest["layers"].pop("embeddings/red/images")
    (dataset / "dataset.json").write_text(json.dumps(manifest))
    assert make_plan(parse_config(config(made, dataset))).pending == []
    lines = refusal(config(made, dataset, teachers=teachers(codec="int8")))
    assert f"embeddings/red/images: fingerprint {entry['fingerprint']} in the dataset, " in "\n".join(lines)
    manifest["layers"]["embeddings/red/images"] = {**entry, "fingerprint": "0123"}
    (dataset / "dataset.json").write_text(json.dumps(manifest))
    lines = refusal(config(made, dataset))
    assert lines[1].startswith("  embeddings/red/images: fingerprint 0123 in the dataset, ")
    assert lines[2] == "    nothing in dataset.json explains the difference"


def test_a_logit_scale_that_is_changed_by_hand_is_refused_by_every_reader_until_the_digest_is_removed(
    made: Path, dataset: Path
) -> None:
    path, url = dataset / "dataset.json", str(dataset)
    path.write_text(path.read_text().replace('"logit_scale": 50.0', '"logit_scale": 3.0'))
    message = r"dataset\.json is not as it was written: .* A logit scale or another value was changed\. Restore"
    readers: list[Callable[[], Any]] = [
        lambda: reinforce.open(url),
        lambda: read_status(url),
        lambda: read_epoch(feed_of(dataset)),
        lambda: make_plan(parse_config(config(made, dataset))),
        lambda: plan_drop(Store(url), ["embeddings/red/*"]),
        lambda: make_view(url, "width > 0"),
    ]
    for read in readers:
        with pytest.raises(UserError, match=message):
            read()
    assert [finding.kind for finding in validate(url).findings] == ["manifest"]
    path.write_text(json.dumps(manifest_to_change(dataset)))
    assert validate(url).valid
    assert reinforce.open(url).manifest["teachers"]["red"]["logit_scale"] == 3.0
