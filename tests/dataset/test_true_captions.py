"""Datasets that keep several true captions of a sample: stored, embedded, read, checked, exported and trained from."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import reinforce
from reinforce.captioning.config import Data as CaptionerData
from reinforce.captioning.data import PairSource
from reinforce.config import Score, parse_config
from reinforce.dataset.kinds.scores import make_scorer
from reinforce.dataset.reading import Dataset
from reinforce.dataset.shard_checks import RowChecks
from reinforce.dataset.store import Store
from reinforce.engine.plan.plan import make_plan
from reinforce.errors import UserError
from reinforce.evaluation.config import RetrievalSet
from reinforce.evaluation.reading import LabelledImage
from reinforce.explore.captions import similarities, text_figures
from reinforce.explore.rows import SampledRows, read_rows, select
from reinforce.publishing.embeddings import export_embeddings
from reinforce.student.config import Data
from reinforce.student.data.feed import StudentFeed
from tests.helpers.commands import printed_by
from tests.helpers.data import config_of, picture, tree, write_tar
from tests.helpers.evaluation import open_retrieval
from tests.helpers.in_loaders import letters, read
from tests.helpers.reinforced import reinforce_here

CAPTIONS = {"five": [f"text {n}" for n in range(5)], "two": ["text 3", "a dog"], "none": [], "more": ["x", *"abcdefg"]}


def write_source(folder: Path) -> dict[str, Any]:
    members = [(f"{key}.png", picture(number)) for number, key in enumerate(CAPTIONS)]
    members += [(f"{key}.txt", "\n".join(texts).encode()) for key, texts in CAPTIONS.items() if texts]
    write_tar(folder / "source.tar", sorted(members, key=lambda member: member[0]))
    return config_of(f"{folder}/source.tar", folder / "out", input={"captions_per_sample": 5})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset, to which the teacher blue was added later."""
    folder = tmp_path_factory.mktemp("several")
    config = write_source(folder)
    blue = config["teachers"].pop("blue")
    reinforce_here(config)
    config["teachers"]["blue"] = blue
    return Path(reinforce_here(config))


def by_key(made: Path) -> dict[str, reinforce.Sample]:
    return {sample.key: sample for sample in reinforce.open(str(made))}


def test_all_true_captions_are_stored_and_each_has_its_vector(made: Path) -> None:
    samples = by_key(made)
    assert {key: [*sample.true_captions] for key, sample in samples.items()} == {
        key: texts[:5] for key, texts in CAPTIONS.items()
    }
    for key, sample in samples.items():
        assert sample.caption == next(iter(CAPTIONS[key]), None)
        for dim, vectors in ((8, sample.texts["red"]["caption"]), (12, sample.texts["blue"]["caption"])):
            assert vectors.shape == (max(1, len(sample.true_captions)), dim)
    five, two = samples["five"].texts["red"]["caption"], samples["two"].texts["red"]["caption"]
    assert np.array_equal(five[3], two[0]), "the same text"
    assert len(np.unique(five, axis=0)) == 5
    assert np.isnan(samples["none"].texts["red"]["caption"]).all()
    assert "text 4" in samples["five"]._repr_html_()


def test_a_dataset_as_a_source_gives_all_of_them_and_a_fresh_run_the_same_files(made: Path, tmp_path: Path) -> None:
    config = config_of(f"{made.parent}/source.tar", tmp_path / "fresh", input={"captions_per_sample": 5})
    assert tree(Path(reinforce_here(config))) == tree(made), "blue was added to stored samples"
    again = config_of(str(made), tmp_path / "again", input={"captions_per_sample": 3}, captioners={}, teachers={})
    found = {sample.key: [*sample.true_captions] for sample in reinforce.open(reinforce_here(again))}
    assert found == {key: texts[:3] for key, texts in CAPTIONS.items()}


def test_dataset_json_states_the_number_and_other_datasets_do_not(made: Path, tmp_path: Path) -> None:
    manifest = json.loads((made / "dataset.json").read_text())
    assert (manifest["input"]["captions_per_sample"], manifest["layers"]["samples"]["count"]) == (5, 5)
    assert manifest["layers"]["embeddings/red/caption"]["count"] == 5
    plain = write_source(tmp_path) | {"input": {}}
    manifest = json.loads((Path(reinforce_here(plain)) / "dataset.json").read_text())
    assert "captions_per_sample" not in manifest["input"]
    assert "count" not in manifest["layers"]["samples"]
    assert "true_captions" not in pq.read_schema(next((tmp_path / "out/samples").glob("*.parquet"))).names
    with pytest.raises(UserError, match=r"captions_per_sample: not set in the dataset, 5 in this config"):
        make_plan(parse_config(write_source(tmp_path)))
    teacher = {"family": "published", "model": "x", "columns": [0, 8], "logit_scale": 50}
    published = {"reinforcements": "x.tar", "teachers": {"x": teacher}, "augmentations": {"size": 24}}
    with pytest.raises(UserError, match=r"captions_per_sample: published vectors are of one true caption. Remove it"):
        make_plan(parse_config(write_source(tmp_path) | published))


def test_validate_passes_and_captions_that_do_not_fit_are_found(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "valid" in printed_by(capsys, "validate", str(made))
    with Store(str(made)).open_layer("samples", reinforce.open(str(made)).shards[0]) as file:
        table = file.read()
    entry = json.loads((made / "dataset.json").read_text())["layers"]["samples"]
    names = table.column_names
    wrong = {"five": [*CAPTIONS["five"], "sixth"], "two": ["a dog"], "none": [], "more": ["x"]}
    column = pa.array([wrong[key] for key in table["key"].to_pylist()], table.schema.field("true_captions").type)
    checks = RowChecks("samples", entry, 2)
    checks.add(table.set_column(names.index("true_captions"), "true_captions", column))
    message = "2 rows do not have their caption as the first of at most 5 true captions (five, two)"
    assert checks.problems(None) == [message]


def feed_of(made: Path, pick: str) -> StudentFeed:
    data = Data.model_validate({"datasets": str(made), "workers": 0, "window": 10, "captions": "both", "pick": pick})
    return StudentFeed(data, seed=5, size=20, tokenize=letters)


def test_a_student_draws_one_an_epoch_with_its_own_vector_and_resumes(made: Path) -> None:
    samples = by_key(made)
    for pick, epochs in (("sequential", 5), ("random", 40)):
        seen: dict[str, list[str]] = {key: [] for key, texts in CAPTIONS.items() if texts}
        batches = [*itertools.islice(feed_of(made, pick).batches(0, 1, len(seen), 0), epochs)]
        for batch in batches:
            for row, (key, text) in enumerate(zip(batch["key"], read(batch["caption"]), strict=True)):
                seen[key].append(text)
                at = samples[key].true_captions.index(text)
                for teacher in ("red", "blue"):
                    stored = samples[key].texts[teacher]["caption"][at]
                    given = batch["targets"][teacher]["caption"][row].numpy()
                    assert np.allclose(given, stored / np.linalg.norm(stored), atol=1e-6)
        assert {key: {*texts} for key, texts in seen.items()} == {key: {*CAPTIONS[key][:5]} for key in seen}
        [resumed] = itertools.islice(feed_of(made, pick).batches(0, 1, len(seen), 4), 1)
        assert read(resumed["caption"]) == read(batches[4]["caption"])
    [batch] = itertools.islice(feed_of(made, "random").batches(0, 1, 4, 0), 1)
    assert {*batch["key"]} == seen.keys(), "a batch may be larger than the usable rows"


def inspected(made: Path) -> SampledRows:
    data = Dataset(str(made))
    return read_rows(data, select(data, 100, 0))


def test_captioners_learn_from_all_of_them_retrieval_is_evaluated_on_them_and_reports_count_them(made: Path) -> None:
    several = {key: texts[:5] for key, texts in CAPTIONS.items() if texts}
    source = PairSource("data", str(made), None, CaptionerData(source=str(made)), seed=0)
    pairs = [pair for shard, _ in source.groups() for pair in source.pairs(shard, Counter())]
    assert {item.key: [*captions] for item, captions in pairs} == several
    for where, expected in (("lines:true_captions", several), ("txt", {key: one[:1] for key, one in several.items()})):
        retrieval = open_retrieval(RetrievalSet(pairs=str(made), captions=[where]))
        assert {one.key: [*one.target] for one in retrieval.examples() if isinstance(one, LabelledImage)} == expected
    kept = sum(map(len, several.values()))
    assert text_figures(inspected(made))["caption"].summary["captions"] == kept


SCORES = {"match": {"similarity": ["red", "blue"], "texts": ["caption", "namer"]}}


def means(sample: reinforce.Sample, texts: str) -> list[float]:
    """Mean cosine by teacher, over each text once."""
    found = []
    for teacher in ("red", "blue"):
        found.append(float((sample.images[teacher] @ sample.texts[teacher][texts].T).mean()))
    return found


def check_scores(url: str) -> None:
    for sample in reinforce.open(url):
        score = sample.values["scores/match"]
        for texts in ("caption", "namer"):
            expected = means(sample, texts)
            if sample.caption is None and texts == "caption":
                assert [score[f"caption_{name}"] for name in ("mean", "max", "spread")] == [None] * 3
            else:
                assert score[f"{texts}_mean"] == pytest.approx(np.mean(expected), abs=1e-6)
                assert score[f"{texts}_spread"] == pytest.approx(np.std(expected), abs=1e-6)
    assert {*by_key(Path(url))} == {*CAPTIONS}


def test_means_over_captions_count_each_once_in_scores_reports_and_exports(made: Path, tmp_path: Path) -> None:
    together = {**write_source(tmp_path / "together"), "scores": SCORES}
    url = reinforce_here(together)
    check_scores(url)
    later = write_source(tmp_path / "later")
    reinforce_here(later)
    reinforce_here({**later, "scores": SCORES})
    [one], [other] = (list((Path(config["output"]) / "scores/match").iterdir()) for config in (together, later))
    assert pq.read_table(one) == pq.read_table(other), "from stored samples"
    samples = [sample for sample in by_key(made).values() if sample.caption is not None]
    cosines = [np.mean(sample.images["red"] @ text) for sample in samples for text in sample.texts["red"]["caption"]]
    found = similarities(inspected(made))["red"]["caption"]
    assert (len(found), found.mean()) == (len(cosines), pytest.approx(np.mean(cosines), abs=1e-3))
    options: dict[str, Any] = {"teacher": "red", "text": "average", "dtype": "float32", "use_ray": False}
    export_embeddings(str(made), str(tmp_path / "vectors"), **options)
    keys = pq.read_table(tmp_path / "vectors" / "metadata")["image_path"].to_pylist()
    exported = np.load(tmp_path / "vectors" / "text_emb" / "text_emb_0.npy")
    for sample in samples:
        mean = sample.texts["red"]["caption"].mean(axis=0)
        assert np.allclose(exported[keys.index(sample.key)], mean / np.linalg.norm(mean), atol=1e-6)


def test_scores_of_one_caption_keep_their_fingerprint() -> None:
    spec = Score.model_validate({"similarity": ["red"], "texts": ["caption", "namer"]})
    assert [make_scorer(spec, captions).identity()["version"] for captions in (1, 2)] == [1, 2]
    assert make_scorer(spec.model_copy(update={"texts": ["namer"]}), 2).identity()["version"] == 1


def test_an_export_takes_the_caption_and_the_vector_of_one_number(made: Path, tmp_path: Path) -> None:
    export_embeddings(str(made), str(tmp_path / "vectors"), teacher="red", text=3, use_ray=False)
    table = pq.read_table(tmp_path / "vectors" / "metadata").to_pydict()
    assert dict(zip(table["image_path"], table["caption"], strict=True)) == {
        "five": "text 3",
        "two": "a dog",
        "more": "c",
    }
    vectors = np.load(tmp_path / "vectors" / "text_emb" / "text_emb_0.npy")
    stored = by_key(made)["two"].texts["red"]["caption"][1]
    assert np.allclose(vectors[table["image_path"].index("two")], stored, atol=2e-3)


def test_a_codebook_that_was_fitted_to_more_captions_is_not_used_for_fewer(tmp_path: Path) -> None:
    """A run ended after its codebooks were fitted; the next one keeps fewer captions of each sample."""
    texts = {f"{n:02d}": [f"{word} {n}" for word in ("one", "two", "three")][: n % 4] for n in range(24)}
    members = [(f"{key}.png", picture(int(key))) for key in texts]
    members += [(f"{key}.txt", "\n".join(lines).encode()) for key, lines in texts.items() if lines]
    source = str(write_tar(tmp_path / "source.tar", sorted(members)))
    red = {**config_of("", "")["teachers"]["red"], "codec": "pca4", "codec_sample": 16}

    def config(captions: int, output: str = "out") -> dict[str, Any]:
        return config_of(source, tmp_path / output, input={"captions_per_sample": captions}, teachers={"red": red})

    reinforce_here(config(3))
    fitted = tree(tmp_path / "out" / "codebooks")
    with pytest.raises(UserError, match=r"input\.captions_per_sample: 3 in the dataset, 2 in this config"):
        reinforce_here(config(2))
    shutil.copytree(tmp_path / "out" / "codebooks", tmp_path / "again" / "codebooks")
    reinforce_here(config(2, "again"))
    assert tree(tmp_path / "again") == tree(Path(reinforce_here(config(2, "first"))))
    again = tree(tmp_path / "again" / "codebooks")
    assert again.keys() == fitted.keys()
    assert all(again[name] != fitted[name] for name in fitted)
