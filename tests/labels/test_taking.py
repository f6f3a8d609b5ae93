"""Labels of another dataset are taken by identity: all that must match do, with equal values, and nothing else."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import reinforce
from reinforce.config import parse_config
from reinforce.engine.messages import ShardResult
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.preflight.check_source import check_source
from reinforce.engine.recompute import check_labels
from reinforce.errors import UserError
from reinforce.labels.building import build_index
from reinforce.publishing.labels import export_labels
from tests.helpers.data import config_of, picture, write_tar
from tests.helpers.decoding import decode_pool
from tests.helpers.images import encode
from tests.helpers.published import quarantine
from tests.helpers.reinforced import reinforce_here

COUNT = 40
LAYERS = ["captions/namer", "embeddings/red", "embeddings/blue"]
MISSING, EXCHANGED, AGAIN = 0, 1, 2  # places in each ten


def smaller(image: bytes) -> bytes:
    """An image at half its size, as JPEG."""
    return encode(Image.open(io.BytesIO(image)).resize((20, 15)), "JPEG")


def sample(number: int, key: str, image: bytes | None = None, **stated: str) -> list[tuple[str, bytes]]:
    fields = stated or {"uid": f"uid{number}", "url": f"https://example.org/{number}"}
    return [
        (f"{key}.png", image or picture(number)),
        (f"{key}.txt", f"thing {number}".encode()),
        (f"{key}.json", json.dumps(fields).encode()),
    ]


def publish(folder: Path, *shards: list[tuple[str, bytes]], indexed: bool = False, **options: Any) -> str:
    """The labels of a dataset of shards with these members, which is beside them; or this dataset, ``indexed``.

    ``options`` are ``identities`` of the export, or changes of the config.
    """
    for number, members in enumerate(shards):
        write_tar(folder / "images" / f"{number}.tar", members)
    identities = options.pop("identities", None)
    dataset = reinforce_here(config_of(f"{folder}/images/*.tar", folder / "dataset", **options))
    if indexed:
        build_index(dataset, use_ray=False)
        return dataset
    return export_labels(dataset, f"{folder}/labels", identities=identities, use_ray=False).output


def samples_of(numbers: Iterable[int]) -> list[tuple[str, bytes]]:
    return [member for number in numbers for member in sample(number, f"{number:05d}")]


def write_labels(folder: Path) -> str:
    """The labels of a lab's dataset of 40 samples in two shards."""
    return publish(folder, samples_of(range(20)), samples_of(range(20, COUNT)))


def dataset_of(labels: str) -> str:
    return str(Path(labels).parent / "dataset")


def write_copy(folder: Path, seed: int = 0) -> None:
    """A copy in three shards, in another order with other keys: a tenth is missing, a tenth exchanged under the same
    key, a tenth encoded again at half the size; and three images are new."""
    numbers = [number for number in range(COUNT + 3) if number >= COUNT or number % 10 != MISSING]
    random.Random(seed).shuffle(numbers)
    for shard in range(3):
        members = []
        for number in numbers[shard::3]:
            key = f"own{number}"
            if number < COUNT and number % 10 == EXCHANGED:
                other = {"uid": f"other{number}", "url": f"https://example.org/other{number}"}
                members += sample(number, f"{number:05d}", picture(1000 + number), **other)
            elif number < COUNT and number % 10 == AGAIN:
                members += sample(number, key, smaller(picture(number)))
            else:
                members += sample(number, key)
        write_tar(folder / "copy" / f"part-{shard}.tar", members)


def taking(folder: Path, url: str, **changes: Any) -> dict[str, Any]:
    labels = {"lab": {"url": url, "layers": LAYERS}}
    own = {"labels": labels, "augmentations": {}, "teachers": {}, "captioners": {}}
    return config_of(f"{folder}/copy/*.tar", folder / "out", **{**own, **changes})


def by_number(url: str) -> dict[int, reinforce.Sample]:
    return {int(str(one.caption).split()[1]): one for one in reinforce.open(url)}


def take(config: dict[str, Any]) -> tuple[dict[int, reinforce.Sample], Counter[str]]:
    """The samples of a run by number, and how many joined by what, or why they did not."""
    results: list[ShardResult] = []
    taken = by_number(reinforce_here(config, results=results))
    return taken, sum((Counter(result.source_counts) for result in results), Counter())


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_labels(tmp_path_factory.mktemp("labels"))


@pytest.mark.parametrize("computed", [False, True])
def test_every_row_that_must_match_has_the_labels_and_no_other(tmp_path: Path, labels: str, computed: bool) -> None:
    write_copy(tmp_path)
    own = {name: config_of("", "")[name] for name in ("teachers", "captioners")} if computed else {}
    before = by_number(dataset_of(labels))
    after, counts = take(taking(tmp_path, labels, **own))
    assert after.keys() == {n for n in range(COUNT + 3) if n >= COUNT or n % 10 != MISSING}
    for number, one in after.items():
        if number < COUNT and number % 10 != EXCHANGED:
            there = before[number]
            assert one.captions["namer"] == there.captions["namer"]
            for teacher, values in there.images.items():
                np.testing.assert_array_equal(one.images[teacher], values)
                np.testing.assert_equal(one.texts[teacher], there.texts[teacher])
            half = 2 if number % 10 == AGAIN else 1
            for theirs, ours in zip(there.augmentations, one.augmentations, strict=True):
                assert (theirs.size, theirs.ops) == (ours.size, ours.ops)
                assert abs(theirs.crop.width - half * ours.crop.width) <= half
                assert half == 2 or theirs == ours
        elif computed:
            assert one.captions["namer"]
            assert np.isfinite(one.images["red"]).all()
        else:
            assert one.captions.get("namer") is None
            assert np.isnan(one.images["red"]).all()
    assert json.loads((tmp_path / "out/dataset.json").read_text())["teachers"]["red"]["dim"] == 8, "of projections"
    samples = pq.read_table(tmp_path / "out" / "samples", columns=["caption", "labelled"]).to_pylist()
    notes = {int(row["caption"].split()[1]): row["labelled"] for row in samples}
    assert (notes[12], notes[13], notes[11], notes[41]) == ("uid, scaled from 40 x 30", "uid", None, None)
    assert counts == {"labels.lab.uid": 32, "labels.lab.absent": 7}


def test_layers_that_are_taken_later_fit_the_stored_rows(tmp_path: Path, labels: str) -> None:
    write_copy(tmp_path)

    def of(*layers: str) -> dict[str, Any]:
        return taking(tmp_path, labels, labels={"lab": {"url": labels, "layers": [*layers], "join": "uid"}})

    reinforce_here(of("embeddings/red/images"))
    with pytest.raises(UserError, match="embeddings/red/images: fingerprint"):  # one model, one recipe
        reinforce_here(of(*LAYERS, "embeddings/red/images"))
    others = of("embeddings/red/images", "embeddings/blue", "captions/namer")
    taken, counts = take(others)
    before = by_number(dataset_of(labels))
    for number, one in taken.items():
        joined = number < COUNT and number % 10 != EXCHANGED
        assert one.captions.get("namer") == (before[number].captions["namer"] if joined else None)
        if joined:
            np.testing.assert_array_equal(one.images["blue"], before[number].images["blue"])
            np.testing.assert_array_equal(one.texts["blue"]["namer"], before[number].texts["blue"]["namer"])
    assert counts["labels.lab.uid"] == 32
    assert not make_plan(parse_config(others)).pending


STATED = {
    "url": lambda number: {"url": f"https://example.org/{number}"},
    "sha256": lambda number: {"sha256": f"{number:064x}"},
}


@pytest.mark.parametrize("kind", STATED)
def test_a_rotten_download_is_another_image(tmp_path: Path, kind: str) -> None:
    """Image 1 has another shape at the same URL, image 2 other pixels; image 3 was encoded again."""
    stated = STATED[kind]
    members = [m for n in range(5) for m in sample(n, f"{n:05d}", **stated(n))]
    url = publish(tmp_path, members, indexed=True)  # of a dataset with its images
    images = {1: picture(1, 30, 30), 2: picture(99), 3: smaller(picture(3))}
    copy = [m for n in range(5) for m in sample(n, f"own{n}", images.get(n), **stated(n))]
    write_tar(tmp_path / "copy" / "0.tar", copy)
    taken, counts = take(taking(tmp_path, url))
    labelled = {number for number, one in taken.items() if one.captions.get("namer")}
    # The SHA-256 is that of the file before it was encoded; a URL may have another image now, which a digest shows.
    assert labelled == ({0, 4} if kind == "url" else {0, 2, 3, 4})
    joined = {"digest": 2, "other_image": 3} if kind == "url" else {"sha256": 4, "other_image": 1}
    assert counts == {f"labels.lab.{name}": count for name, count in joined.items()}


RED = config_of("", "")["teachers"]["red"]
BAD: list[tuple[dict[str, Any], str]] = [
    ({"url": "nowhere"}, "is not a reinforced dataset"),
    ({"layers": ["captions/other"]}, "has no captions/other; what can be taken: captions/namer"),
    ({"layers": ["embeddings/red/namer"]}, "captions/namer; take them too"),
    ({"teachers": {"red": {"class": "tests.helpers.models:TextOnly"}}}, "is not the model of labels.lab"),
    ({"teachers": {"red": {**RED, "codec": "int8"}}}, "set float16"),
    ({"augmentations": {"count": 3}}, "augmentations.count: 3 in this config, 2 of labels.lab"),
    ({"augmentations": {"size": 32}}, "augmentations.size: 32 in this config, 24"),
    ({"augmentations": {"backend": "fixed-point-1"}}, "augmentations.backend: fixed-point-1"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, labels: str, changes: dict[str, Any], message: str) -> None:
    own = {key: value for key, value in changes.items() if key not in ("url", "layers")}
    lab = {"url": labels, "layers": LAYERS, **{key: changes[key] for key in changes.keys() - own.keys()}}
    with pytest.raises(UserError, match=message):
        make_plan(parse_config(taking(tmp_path, labels, labels={"lab": lab}, **own)))


def test_labels_without_an_index_are_refused_and_others_counted_before_a_run(tmp_path: Path, labels: str) -> None:
    write_copy(tmp_path)
    _, notes = check_source(make_plan(parse_config(taking(tmp_path, labels))))
    assert any(note.startswith("labels.lab: the first") and "by uid" in note for note in notes)
    shutil.copytree(labels, tmp_path / "labels", ignore=shutil.ignore_patterns("identities"))
    with pytest.raises(UserError, match=r"has no identities/index\.json"):
        check_source(make_plan(parse_config(taking(tmp_path, f"{tmp_path}/labels"))))
    # The check of labels prints how near stored and computed vectors are.
    config = parse_config(taking(tmp_path, labels, teachers={"red": RED}))
    lines = check_labels(config, 43, decode_pool())
    cosines = {line.partition(":")[0]: line for line in lines}
    assert "median 1.0000" in cosines["embeddings/red/images"]
    assert "below 0.99" not in cosines["embeddings/red/caption"]  # of texts, which no copy changes
    assert cosines["embeddings/blue/images"].endswith("its model is not in the config, so it is not loaded")
    assert not (tmp_path / "out").exists()


def test_an_index_that_names_wrong_rows_joins_no_other(tmp_path: Path, labels: str) -> None:
    write_copy(tmp_path)
    copied = Path(shutil.copytree(labels, tmp_path / "labels"))
    one, two = sorted(copied.glob("samples/*.parquet"))
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    results: list[ShardResult] = []
    taken = by_number(reinforce_here(taking(tmp_path, str(copied)), results=results))
    assert not any(sample.captions.get("namer") for sample in taken.values())
    assert sum(result.refused["not_reinforced"] + result.refused["reinforcement_broken"] for result in results) > 0


@pytest.mark.parametrize("join", ["url", "key"])
def test_keys_join_only_where_neither_side_states_anything_and_the_config_says_so(tmp_path: Path, join: str) -> None:
    members = [member for n in range(3) for member in sample(n, f"{n:05d}")[:2]]
    url = publish(tmp_path, members, identities=["uid"])
    write_tar(tmp_path / "copy" / "0.tar", [*members[:4], *sample(2, "00002")])  # the last one states a uid
    labels = {"lab": {"url": url, "layers": ["captions/namer"], "join": join}}
    taken = by_number(reinforce_here(taking(tmp_path, url, labels=labels)))
    joined = {number for number, one in taken.items() if one.captions.get("namer")}
    assert joined == ({0, 1} if join == "key" else set())


SEVERAL, MOST = 12, 3  # samples with several captions, and how many at most
READ = {"captions": ["json:captions"], "captions_per_sample": MOST}
STRANGE = 7  # the number of the sample whose captions another copy has changed


def captions_of(number: int) -> list[str]:
    return [f"{word} {number}" for word in ("one", "two", "three")[: 1 + number % MOST]]


def write_several(path: Path, reverse: bool = False) -> None:
    """Images with one to three captions each, or a copy of them in another order with these in another order."""
    members = []
    for number in reversed(range(SEVERAL)) if reverse else range(SEVERAL):
        texts = captions_of(number)[:: -1 if reverse else 1] + ["other"] * (reverse and number == STRANGE)
        fields = {"uid": f"uid{number}", "captions": texts, "first": texts[0]}
        members += [
            (f"{'own' if reverse else ''}{number}.png", picture(number)),
            (f"{'own' if reverse else ''}{number}.json", json.dumps(fields).encode()),
        ]
    write_tar(path, members)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("several")
    write_several(folder / "images" / "0.tar")
    dataset = reinforce_here(config_of(f"{folder}/images/*.tar", folder / "dataset", input=READ))
    exported = export_labels(dataset, f"{folder}/labels", use_ray=False)
    assert any("sets input.captions_per_sample: 3" in line for line in exported.lines())
    return exported.output


@pytest.mark.parametrize(
    "read", [READ, {**READ, "captions_per_sample": 2}, {**READ, "captions_per_sample": 5}, {"captions": ["json:first"]}]
)
@pytest.mark.parametrize("own", [False, True])  # whether the config has the model too
def test_vectors_are_what_the_model_computes(tmp_path: Path, several: str, read: dict[str, Any], own: bool) -> None:
    write_several(tmp_path / "copy" / "0.tar", reverse=True)
    source = f"{tmp_path}/copy/*.tar"
    expected = reinforce_here(config_of(source, tmp_path / "computed", input=read))
    models = {"teachers": config_of("", "")["teachers"]} if own else {}
    config = taking(tmp_path, several, input=read, **models)
    for one, other in zip(reinforce.open(expected), reinforce.open(reinforce_here(config)), strict=True):
        assert one.true_captions == other.true_captions
        if own or "other" not in one.true_captions:
            np.testing.assert_array_equal(one.texts["red"]["caption"], other.texts["red"]["caption"])
        else:
            assert np.isnan(other.texts["red"]["caption"]).all()  # one of its captions is not in the labels
        assert len(other.texts["red"]["namer"]) == 2


def test_a_sample_without_a_caption_has_no_text_with_labels_and_without_them(tmp_path: Path) -> None:
    write_several(tmp_path / "source" / "0.tar")
    members = [(f"{SEVERAL}.png", picture(SEVERAL)), (f"{SEVERAL}.json", json.dumps({"uid": "uid12"}).encode())]
    write_tar(tmp_path / "source" / "1.tar", members)
    computed = reinforce_here(config_of(f"{tmp_path}/source/*.tar", tmp_path / "own" / "out", input=READ))
    exported = export_labels(computed, f"{tmp_path}/labels", use_ray=False)
    shutil.copytree(tmp_path / "source", tmp_path / "copy")
    reinforce_here(taking(tmp_path, exported.output, input=READ))
    layer = "embeddings/red/caption"
    own, taken = (set(quarantine(folder, layer)) for folder in (tmp_path / "own", tmp_path))
    assert own == taken == {(str(SEVERAL), "no_text")}


def test_a_plan_states_what_is_read_of_them(tmp_path: Path, several: str) -> None:
    write_several(tmp_path / "copy" / "0.tar", reverse=True)
    _, notes = check_source(make_plan(parse_config(taking(tmp_path, several, input={"captions": ["json:first"]}))))
    assert any("input.captions_per_sample: 3 takes all" in note for note in notes)
    _, notes = check_source(make_plan(parse_config(taking(tmp_path, several, input=READ))))
    assert not any("takes all" in note for note in notes)


def test_layers_of_captions_that_are_taken_later_fit_the_stored_ones(tmp_path: Path, several: str) -> None:
    write_several(tmp_path / "copy" / "0.tar", reverse=True)

    def of(*layers: str) -> dict[str, Any]:
        return taking(tmp_path, several, input=READ, labels={"lab": {"url": several, "layers": [*layers]}})

    reinforce_here(of("embeddings/blue"))
    later = reinforce.open(reinforce_here(of("embeddings/blue", "embeddings/red/caption")))
    at_once = reinforce.open(reinforce_here({**of(*LAYERS), "output": f"{tmp_path}/at-once"}))
    for one, other in zip(at_once, later, strict=True):
        np.testing.assert_array_equal(one.texts["red"]["caption"], other.texts["red"]["caption"])


@pytest.mark.parametrize("kind", ["uid", "url", "key"])
def test_texts_with_equal_hashes_are_no_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Neither a uid nor a URL nor a key joins by its hash alone."""
    for module in ("index", "joining"):
        monkeypatch.setattr(f"reinforce.labels.{module}.hash_text", lambda text: 43)
    members = 2 if kind == "key" else 3  # without the json, whose uid and url would be compared
    own = "00000" if kind == "key" else "own0"
    url = publish(tmp_path, sample(0, "00000")[:members], identities=["uid" if kind == "key" else kind])
    write_tar(tmp_path / "copy" / "0.tar", [*sample(0, own)[:members], *sample(1, "own1")[:members]])
    labels = {"lab": {"url": url, "layers": ["captions/namer"], "join": kind}}
    taken = by_number(reinforce_here(taking(tmp_path, url, labels=labels)))
    assert {number for number, one in taken.items() if one.captions.get("namer")} == {0}
