"""Layers of scores: what they hold, what they depend on, and what they cost."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save_file

import reinforce
from reinforce.config import Score, parse_config
from reinforce.dataset.drop import plan_drop
from reinforce.dataset.kinds.scores import Facts
from reinforce.dataset.layer_file import LayerFile
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.manifest import read_manifest, write_manifest
from reinforce.dataset.store import Store
from reinforce.dataset.validate import validate
from reinforce.engine.messages import LayerFailure
from reinforce.engine.plan.plan import build_layers, describe_models, make_plan
from reinforce.engine.recompute import recompute
from reinforce.engine.worker.models import load_models
from reinforce.engine.worker.producers.registry import check_models
from reinforce.errors import UserError
from reinforce.source.urls import digest_of
from teachers.fit import fit
from tests.helpers.commands import printed_by
from tests.helpers.data import config_of, members_of, tree, write_tar
from tests.helpers.models.scorers import SPEC
from tests.helpers.reinforced import reinforce_here

SCORES: dict[str, Any] = {
    "match": {"similarity": ["red", "blue"], "texts": ["caption", "namer"]},
    "pretty": {"head": "head.safetensors", "teacher": "red", "names": ["nice", "safe"]},
    "sizes": {"facts": ["width", "height", "aspect", "bytes", "characters", "words"]},
}
CAPTIONLESS, COUNT = "00000003", 11
OURS = "tests.helpers.models.scorers:"
CLASSES: dict[str, Any] = {
    "colors": {"class": f"{OURS}Colors"},
    "described": {"class": f"{OURS}Described"},
    "every": {"class": f"{OURS}Everything"},
    "letters": {"class": f"{OURS}Length", "names": "characters"},
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The config of a dataset with scores, one sample of which has no caption."""
    monkeypatch.chdir(tmp_path)
    members = [member for member in members_of(0, COUNT) if member[0] != f"{CAPTIONLESS}.txt"]
    write_tar(tmp_path / "source" / "0.tar", members)
    rng = np.random.default_rng(0)
    head = {"weight": rng.normal(size=(2, 8)).astype(np.float32), "bias": np.array([1, -1], np.float32)}
    save_file(head, tmp_path / "head.safetensors")
    return config_of("source/*.tar", "out", scores=SCORES)


def similarities(sample: reinforce.Sample, teacher: str, texts: str) -> np.ndarray[Any, Any]:
    return sample.images[teacher] @ sample.texts[teacher][texts].T


def test_scores_are_those_of_the_stored_vectors_and_samples_and_commands_know_them(
    config: dict[str, Any], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # charts of scores are those of tests/inspection
    url = reinforce_here(config)
    samples = list(reinforce.open(url))
    assert len(samples) == COUNT
    with_caption = [sample for sample in samples if sample.key != CAPTIONLESS]
    [without] = [sample for sample in samples if sample.key == CAPTIONLESS]
    for sample in with_caption:
        match, pretty, sizes = (sample.values[f"scores/{name}"] for name in SCORES)
        for texts in ("caption", "namer"):
            found = [similarities(sample, teacher, texts) for teacher in ("red", "blue")]
            means = [one.mean() for one in found]
            assert match[f"{texts}_mean"] == pytest.approx(np.mean(means), abs=1e-6)
            assert match[f"{texts}_max"] == pytest.approx(np.mean([one.max() for one in found]), abs=1e-6)
            assert match[f"{texts}_spread"] == pytest.approx(np.std(means), abs=1e-6)
        rng = np.random.default_rng(0)
        outputs = sample.images["red"] @ rng.normal(size=(2, 8)).astype(np.float32).T + np.array([1, -1])
        assert [pretty[f"{name}_mean"] for name in ("nice", "safe")] == pytest.approx(outputs.mean(axis=0), abs=1e-5)
        assert [pretty[f"{name}_max"] for name in ("nice", "safe")] == pytest.approx(outputs.max(axis=0), abs=1e-5)
        caption = str(sample.caption)
        facts = {"width": 40, "height": 30, "aspect": 4 / 3, "bytes": len(sample.image)}
        assert sizes == pytest.approx({**facts, "characters": len(caption), "words": len(caption.split())})
    match, sizes = without.values["scores/match"], without.values["scores/sizes"]
    assert {name for name, value in {**match, **sizes}.items() if value is None} == {
        *("caption_mean", "caption_max", "caption_spread", "characters", "words")
    }, "null where an input is null"

    Path("run.yaml").write_text(yaml.safe_dump(config))
    assert "scores/match" in printed_by(capfd, "plan", "run.yaml")
    status = json.loads(printed_by(capfd, "status", url, "--json"))
    assert status["layers"]["scores/pretty"]["shards"] == 1
    assert "caption_mean, caption_max" in printed_by(capfd, "status", url)
    printed_by(capfd, "inspect", url, "report")
    assert "nice_mean" in Path("report", "index.html").read_text()
    plots = Path("report", "plots.html").read_text()
    assert "scores/match: caption_spread" in plots
    assert f"Of {COUNT - 1} samples; 1 have none." in plots
    of_namer = ["scores/match", "embeddings/blue/namer", "embeddings/red/namer"]
    assert plan_drop(Store(url), ["captions/namer"]).dependants == of_namer
    assert plan_drop(Store(url), ["embeddings/red/images"]).dependants == ["scores/match", "scores/pretty"]
    assert plan_drop(Store(url), ["scores/*"]).dependants == []


def test_scores_and_classes_that_are_added_later_give_equal_bytes_and_use_no_other_model(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = {**config, "scores": {**SCORES, **CLASSES}}
    reinforce_here({**every, "output": "at-once"})
    reinforce_here({**config, "scores": {}})
    plan = make_plan(parse_config(config))
    assert [shard.layers for shard in plan.pending] == [tuple(f"scores/{name}" for name in SCORES)]
    with monkeypatch.context() as patch:
        patch.setattr("tests.helpers.models.ColorTeacher.encode_images", lambda *_: 1 / 0)
        results: list[Any] = []
        for more in (config, every):
            reinforce_here(more, results=results)
    assert (results[0].samples, results[0].busy) == (COUNT, 0)
    assert results[1].stages.keys() == {f"scores/{name}" for name in CLASSES}
    at_once, in_turn = (tree(tmp_path / of) for of in ("at-once", "out"))
    assert at_once.keys() == in_turn.keys()
    assert [name for name, data in at_once.items() if in_turn[name] != data] == []
    assert validate("out").findings == []
    compared = recompute(parse_config(every), "out", COUNT).layers
    assert all(compared[f"scores/{name}"].equal == compared[f"scores/{name}"].rows > 0 for name in every["scores"])


@pytest.mark.parametrize("images", ["embed", "reference"])
def test_stored_samples_give_the_facts_that_read_ones_give(images: str, config: dict[str, Any]) -> None:
    facts = {"sizes": {"facts": [*SCORES["sizes"]["facts"], "digest_1", "digest_2"]}}
    config = {**config, "images": images, "teachers": {}, "captioners": {}}
    [first, later] = [{**config, "output": output, "scores": facts} for output in ("first", "later")]
    reinforce_here(first)
    reinforce_here({**later, "scores": {}})
    reinforce_here(later)
    tables = [pq.read_table(next(Path(of, "scores/sizes").glob("*.parquet"))) for of in ("first", "later")]
    assert tables[0].equals(tables[1])
    assert tables[0]["scores"].to_pylist()[0]["bytes"] > 100
    for sample in reinforce.open(str(Path("first").absolute()), images_from=[str(Path().absolute())]):
        digest, sizes = digest_of(sample.image), sample.values["scores/sizes"]
        assert (sizes["digest_1"], sizes["digest_2"]) == (digest & 0xFFFFFF, digest >> 24 & 0xFFFFFF)


def test_a_damaged_or_changed_layer_of_scores_is_found_and_another_head_is_another_layer(
    config: dict[str, Any],
) -> None:
    store = Store(reinforce_here(config))
    save_file({"weight": np.ones((2, 8), np.float32)}, "head.safetensors")
    with pytest.raises(UserError, match=r"scores/pretty: fingerprint .*\n    head: \"sha256:") as raised:
        make_plan(parse_config(config))
    assert "scores/match" not in str(raised.value)
    [path] = Path("out/scores/pretty").glob("*.parquet")
    groups = pq.ParquetFile(pa.BufferReader(path.read_bytes()))
    schema = groups.schema_arrow
    with pq.ParquetWriter(path, schema) as writer:
        for group in map(groups.read_row_group, range(groups.num_row_groups)):
            scores = [{**row, "nice_mean": float("inf")} for row in group["scores"].to_pylist()]
            writer.write_table(pa.table([group["key"], pa.array(scores, schema.field("scores").type)], schema=schema))
    messages = [finding.message for finding in validate(store.url).findings]
    assert any("nice_mean that is NaN or infinite" in message for message in messages), messages
    manifest = read_manifest(store)
    manifest["layers"]["scores/pretty"]["needs"].append("scores/pretty")  # a circle
    write_manifest(store, manifest)
    assert any("scores/pretty" in finding.message for finding in validate(store.url).findings)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ({}, "set one of similarity, head, facts, class"),
        ({"similarity": "red", "facts": ["width"]}, "set one of similarity, head, facts"),
        ({"similarity": "red", "teacher": "red"}, "teacher: not used with `similarity`; remove it"),
        ({"similarity": ["red", "red"]}, "red, red: a name occurs twice"),
        ({"head": "head.safetensors"}, "set `teacher`, to whose embeddings"),
        ({"facts": ["weight"]}, "facts"),
        ({"facts": ["tokens"], "tokenizer": "ViT-B-31"}, "model 'ViT-B-31' is unknown to open_clip"),
        ({"facts": ["words"], "tokenizer": "ViT-B-32"}, "tokenizer: used only for the fact `tokens`"),
        ({"class": "Aesthetic"}, "`class` must be package.module:Class"),
        ({"class": f"{OURS}Lost"}, "has no such name"),
        ({"class": f"{OURS}Length", "teacher": "red"}, "teacher: not used with `class`"),
        ({"class": f"{OURS}Length", "options": {"depth": 1}}, "got an unexpected keyword argument 'depth'"),
        ({"class": f"{OURS}NoScore"}, "has no method `score`"),
        ({"class": f"{OURS}NoNames"}, "must set `names` to a list of texts, got None"),
        ({"class": f"{OURS}Unknown"}, "has the input 'text'; use pixels, caption, metadata, or a layer"),
        ({"class": f"{OURS}Other"}, "sees pixels and metadata, which are not computed at the same time"),
        ({"class": f"{OURS}TwoInputs"}, "does not take its inputs caption, metadata: too many positional arguments"),
        ({"class": f"{OURS}Length", "inputs": "captions/poet"}, "captions/poet is no layer of this config"),
        ({"similarity": "green"}, "embeddings/green/images, embeddings/green/caption is no layer of this config"),
        ({"similarity": "red", "texts": "poet"}, "embeddings/red/poet is no layer of this config"),
        ({"head": "nowhere.safetensors", "teacher": "red"}, "nowhere.safetensors"),
    ],
)
def test_a_score_that_cannot_be_computed_is_one_error(score: Any, message: str, config: dict[str, Any]) -> None:
    with pytest.raises(UserError) as raised:
        make_plan(parse_config({**config, "scores": {"mine": score}}))
    assert message in str(raised.value)
    assert "scores.mine" in str(raised.value)


def test_only_facts_about_bytes_read_images(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**config, "teachers": {}, "captioners": {}, "scores": {}}
    reinforce_here(config)
    asked: list[Any] = []
    read = LayerFile.read_row_group

    def recorded(self: LayerFile, number: int, columns: Any = None) -> pa.Table:
        asked.extend(self._names if columns is None else columns)
        return read(self, number, columns)

    monkeypatch.setattr(LayerFile, "read_row_group", recorded)
    for fact, reads_images in (("bytes", True), ("words", False)):
        asked.clear()
        reinforce_here({**config, "scores": {fact: {"facts": [fact]}}})
        assert "key" in asked
        assert ("image" in asked) == reads_images


@pytest.mark.parametrize(
    ("tokenizer", "counts"), [("ViT-B-32", [5, 200]), ("local-dir:configs/demo-models/conv-64", [7, 200])]
)
def test_tokens_are_those_of_the_whole_caption_without_marks(tokenizer: str, counts: list[int]) -> None:
    if tokenizer.startswith("local-dir:"):
        pytest.importorskip(
            "transformers", "5", reason="earlier versions cannot read the tokenizer of the demo's models"
        )
    samples = pa.table({"caption": ["a photo of a cat", None, "cat " * 200]})
    found = Facts(Score(facts=["tokens"], tokenizer=tokenizer), 1).scores({SAMPLES: samples}, lambda _: None)["tokens"]
    assert [*found[[0, 2]]] == counts
    assert np.isnan(found[1])


def test_a_class_scores_the_image_as_a_whole_texts_metadata_and_stored_vectors(config: dict[str, Any]) -> None:
    samples = list(reinforce.open(reinforce_here({**config, "scores": CLASSES})))
    assert len(samples) == COUNT
    for sample in samples:
        found = {name: sample.values[f"scores/{name}"] for name in CLASSES}
        with Image.open(io.BytesIO(sample.image)) as image:
            red, _, blue = fit(image.convert("RGB"), SPEC).mean(axis=(0, 1)) / 255
        assert found["colors"] == pytest.approx({"red": red, "blue": blue}, abs=1e-5)
        if sample.key == CAPTIONLESS:
            found.pop("colors")
            assert {value for scores in found.values() for value in scores.values()} == {None}
            continue
        length = len(str(sample.caption))
        assert found["described"]["product"] == pytest.approx(red * length, rel=1e-4)
        assert found["letters"] == {"characters": length}
        synthetic = sum(map(len, sample.captions["namer"]))
        first = sample.images["red"][0, 0]
        every = {"first": first, "true": length, "synthetic": synthetic, "uid": int(sample.metadata["uid"])}
        assert found["every"] == pytest.approx(every, abs=1e-6)


def test_scores_of_a_teacher_that_is_not_here_are_left_out_when_rows_are_computed_again(config: dict[str, Any]) -> None:
    url = reinforce_here({**config, "scores": {**SCORES, "red": CLASSES["colors"]}})
    scores = {**SCORES, "red": CLASSES["colors"]}
    lost = {**config["teachers"], "red": {"class": "nowhere:Lost"}}
    found = recompute(parse_config({**config, "teachers": lost, "scores": scores}), url, 4)
    assert [line.partition(":")[0] for line in found.left_out] == ["teacher red", "score match", "score pretty"]
    assert {name for name in found.layers if name.startswith("scores/")} == {"scores/sizes", "scores/red"}


def test_options_inputs_names_and_version_of_a_class_are_in_the_fingerprint(config: dict[str, Any]) -> None:
    def fingerprint(captioners: Any = config["captioners"], **changes: Any) -> str:
        scores = {"mine": {"class": f"{OURS}Length", **changes}, "match": {"similarity": "red"}}
        layers = make_plan(parse_config({**config, "captioners": captioners, "scores": scores})).layers
        return layers["scores/mine"].fingerprint + layers["scores/match"].fingerprint

    before = fingerprint()
    assert fingerprint(captioners={}) == before, "a captioner that is added changes no score"
    assert fingerprint(names=["letters"], inputs=["caption"], options={}) == before
    changes = ({"names": ["other"]}, {"inputs": ["captions/namer"]}, {"options": {"wrong": "nan"}})
    others = {fingerprint(**change) for change in changes}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.helpers.models.scorers.Length.version", 2, raising=False)
        others.add(fingerprint())
    assert len(others - {before}) == 4


def test_a_score_that_is_nan_is_null_and_counted_with_the_name_of_its_class(config: dict[str, Any]) -> None:
    scores = {"every": {**CLASSES["every"], "options": {"nan": "00000005"}}}
    results: list[Any] = []
    url = reinforce_here({**config, "scores": scores}, results=results)
    assert results[0].refused["not_finite"] == 1
    assert results[0].examples["not_finite"] == f"00000005: {OURS}Everything returned NaN or infinity for first"
    [path] = Path(url, "scores", "every").glob("*.parquet")
    row = pq.read_table(path)["scores"].to_pylist()[5]
    assert row == {**row, "first": None, "uid": 5.0}


def test_a_class_or_a_head_that_fails_costs_its_own_layer_only(config: dict[str, Any]) -> None:
    scores = {**CLASSES, "every": {**CLASSES["every"], "options": {"rows": "fewer"}}}
    message = r"Everything\.score\(\) must return numbers of shape \(7, 4\), one for each of 7 .* got float64 \(6, 4\)"
    with pytest.raises(LayerFailure, match=message) as raised:
        reinforce_here({**config, "scores": scores})
    assert raised.value.layer == "scores/every"
    save_file({"weight": np.ones((2, 5), np.float32)}, "head.safetensors")
    with pytest.raises(Exception, match=r"head\.safetensors is for vectors of 5 numbers, not 8"):
        reinforce_here({**config, "output": "other"})


@pytest.mark.parametrize("name", ["colors", "every"])
def test_a_batch_of_a_class_that_does_not_fit_is_halved(name: str, config: dict[str, Any]) -> None:
    whole, halved = [{**config, "output": f"{n}", "workers": {"batch": 16}} for n in ("whole", "halved")]
    reinforce_here({**whole, "scores": {name: CLASSES[name]}})
    results: list[Any] = []
    small = {**CLASSES[name], "options": {"capacity": 2}}
    reinforce_here({**halved, "scores": {name: small}}, results=results)
    [note] = results[0].notes[-1:]
    assert re.match(rf"scores/{name}: \d \w+ at once do not fit in the memory of the device; from now on 2", note)
    before, after = (pq.read_table(next(Path(of, "scores", name).glob("*.parquet"))) for of in ("whole", "halved"))
    assert before.equals(after)
    with pytest.raises(UserError, match="a smaller model in scores"):
        reinforce_here({**halved, "output": "none", "scores": {name: {**small, "options": {"capacity": 0.5}}}})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("rows", r"must return numbers of shape \(\d+, 1\), one for each of \d+ samples .*, got float32 \(1,\)"),
        ("columns", r"got float32 \(1, 2\)"),
        ("type", "got str"),
        ("nan", "scores must be finite"),
        ("random", "the same batch gives other scores the second time"),
        ("batch", "samples get other scores in a batch than alone"),
        ("", None),
    ],
)
def test_the_self_test_finds_classes_that_score_wrongly(
    wrong: str, message: str | None, config: dict[str, Any]
) -> None:
    parsed = parse_config({**config, "scores": {"mine": {"class": f"{OURS}Length", "options": {"wrong": wrong}}}})
    layer = build_layers(parsed, describe_models(parsed))["scores/mine"]
    models = load_models(parsed, [layer])
    for full in (None, parsed):
        if message is None:
            check_models(models, [layer], {}, full)
        elif full is None or wrong != "random":
            with pytest.raises(UserError, match=rf"^scores\.mine fails its self-test \(scores.*{message}"):
                check_models(models, [layer], {}, full)
    parsed = parse_config({**config, "scores": {"mine": {"class": f"{OURS}NoImage"}}})
    with pytest.raises(UserError, match=r"scores\.mine: class .*NoImage sees pixels and must set `image`"):
        load_models(parsed, build_layers(parsed, describe_models(parsed)).values())


def test_an_image_that_has_changed_is_not_shown_to_a_class(config: dict[str, Any]) -> None:
    config = {**config, "images": "reference", "teachers": {}, "captioners": {}}
    reinforce_here({**config, "scores": {}})
    write_tar(Path("source/0.tar"), members_of(7, COUNT))
    with pytest.raises(LayerFailure) as raised:
        reinforce_here({**config, "scores": {"letters": CLASSES["letters"], "colors": CLASSES["colors"]}})
    assert raised.value.layer == "scores/colors"
