"""Codecs with codebooks: what is stored, read, checked and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

import reinforce
from reinforce.config import parse_config
from reinforce.dataset.codecs.codebooks import codebook_of, find_codec, find_fitted, load, path_of
from reinforce.dataset.codecs.plain import DEVIATION, Standardised
from reinforce.dataset.convert import convert
from reinforce.dataset.drop import drop, plan_drop
from reinforce.dataset.kinds.registry import kind_of, stored_layer
from reinforce.dataset.layers import Comparison
from reinforce.dataset.store import Store
from reinforce.dataset.validate import validate
from reinforce.engine.plan.plan import make_plan
from reinforce.errors import UserError
from reinforce.explore.neighbours import mean_vectors
from reinforce.explore.report import inspect
from reinforce.publishing.card import write_card
from reinforce.publishing.labels import export_labels
from tests.helpers.data import config_of, members_of, tree, write_tar
from tests.helpers.reinforced import reinforce_here

pytest.importorskip("faiss")

MODEL = {"class": "tests.helpers.models:ColorTeacher", "options": {"size": 16, "dim": 8}}
FITTED = ("pca6", "pq4", "rq3")
LAYER = "embeddings/pq4/images"


@pytest.fixture(autouse=True, scope="module")
def small_samples() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reinforce.dataset.codecs.quantisers._LEAST_FOR_EACH", 1)
        find_codec.cache_clear()
        yield
    find_codec.cache_clear()


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One teacher in each codec."""
    folder = tmp_path_factory.mktemp("stored")
    for number in range(3):
        write_tar(folder / "source" / f"{number:05d}.tar", members_of(number, 100, width=9, height=8))
    return Path(reinforce_here(config(folder), 64))


def config(folder: Path, output: Path | None = None, **codecs: str) -> dict[str, Any]:
    names = codecs or {name: name for name in ("float16", *FITTED)}
    teachers = {name: {**MODEL, "codec": codec, "codec_sample": 280} for name, codec in names.items()}
    augmentations = {"count": 2, "size": 16}
    changes = {"captioners": {}, "teachers": teachers, "augmentations": augmentations}
    return config_of(f"{folder}/source/*.tar", output or folder / "out", **changes)


def test_codes_decode_to_unit_vectors_near_those_of_float16(stored: Path) -> None:
    cosines: dict[str, list[float]] = {name: [] for name in FITTED}
    for sample in reinforce.open(str(stored)):
        for name in FITTED:
            for one, other in (
                (sample.images[name], sample.images["float16"]),
                (sample.texts[name]["caption"], sample.texts["float16"]["caption"]),
            ):
                assert np.abs(np.linalg.norm(one, axis=1) - 1).max() < 1e-5
                cosines[name] += (one * other.astype(np.float32)).sum(1).tolist()
    assert {name: len(found) for name, found in cosines.items()} == dict.fromkeys(FITTED, 900)
    assert min(np.mean(found) for found in cosines.values()) > 0.98


def test_codes_are_encoded_from_float16_by_a_codebook_of_the_same_numbers_when_it_is_fitted_again(
    stored: Path, tmp_path: Path
) -> None:
    again = Path(reinforce_here(config(stored.parent, tmp_path / "again"), 64))
    assert tree(again) == tree(stored)
    store = Store(str(stored))
    for name in FITTED:
        layer = stored_layer(
            f"embeddings/{name}/images",
            json.loads((stored / "dataset.json").read_text())["layers"][f"embeddings/{name}/images"],
        )
        codebook = load(layer.codebook_at(str(stored)))
        for shard in store.shards(layer.name):
            with (
                store.open_layer(layer.name, shard) as file,
                store.open_layer("embeddings/float16/images", shard) as finer,
            ):
                values = layer.kind.decode(finer.read())
                codes = file.read()["embeddings"].combine_chunks().to_numpy_ndarray()
            assert np.array_equal(codebook.encode(values), codes)


def test_a_run_that_adds_shards_uses_the_stored_codebook(stored: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(stored.parent, tmp_path / "copied")
    before = tree(copied / "out" / "codebooks")
    write_tar(copied / "source" / "00003.tar", members_of(3, 5, width=9, height=8))
    values = config(copied, copied / "out")
    values["source"] = [*[f"{stored.parent}/source/{n:05d}.tar" for n in range(3)], f"{copied}/source/00003.tar"]
    reinforce_here(values, 64)
    assert tree(copied / "out" / "codebooks") == before
    assert len(Store(str(copied / "out")).shards(LAYER)) == 4
    assert validate(str(copied / "out")).valid


def test_a_codebook_that_is_lost_or_altered_by_one_bit_is_refused_by_name(stored: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(stored, tmp_path / "copied")
    path = copied / "codebooks" / f"{LAYER}.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    for damage, message in ((lambda: path.write_bytes(content), "it was changed"), (path.unlink, "is missing")):
        load.cache_clear()
        damage()
        with pytest.raises(UserError, match=rf"pq4/images\.safetensors, the codebook of {LAYER}, .*{message}"):
            next(iter(reinforce.open(str(copied))))
        found = validate(str(copied))
        assert [(one.kind, one.layer) for one in found.findings] == [("codebook", LAYER)]
        write_tar(tmp_path / "more" / "9.tar", members_of(9, 3))
        more = {**config(stored.parent, copied), "source": [f"{stored.parent}/source/*.tar", f"{tmp_path}/more/9.tar"]}
        with pytest.raises(UserError, match=message):
            reinforce_here(more, 64)
        inspect(str(copied), str(tmp_path / "report"))
        assert message in (tmp_path / "report" / "index.html").read_text()
    assert sum(1 for _ in reinforce.open(str(copied), teachers=["float16", "rq3"])) == 300


def test_dropping_a_layer_deletes_its_codebook_and_a_new_run_fits_the_same(stored: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(stored, tmp_path / "copied")
    before, store = tree(copied), Store(str(copied))
    drop(store, plan_drop(store, ["embeddings/pq4/*"]))
    assert not [name for name in tree(copied) if "pq4" in name]
    reinforce_here(config(stored.parent, copied), 64)
    again, manifests = tree(copied), []
    for files in (before, again):
        manifests.append(json.loads(files.pop("dataset.json")))
    assert (again, manifests[1]) == (before, manifests[0])


def test_what_codes_decode_to_is_compared_with_vectors_of_float16(stored: Path, tmp_path: Path) -> None:
    other = reinforce_here(config(stored.parent, tmp_path / "other", **dict.fromkeys(FITTED, "float16")), 64)
    for name in FITTED:
        layer, one = f"embeddings/{name}/images", Comparison()
        for shard in Store(other).shards(layer):
            with Store(str(stored)).open_layer(layer, shard) as coded, Store(other).open_layer(layer, shard) as plain:
                one.add(kind_of(layer).compare(coded.read(), plain.read()))
        assert one.rows == 300
        assert one.cosine is not None
        assert 0.5 < one.cosine < 1


def test_a_training_example_a_selection_and_a_report_read_codes(stored: Path, tmp_path: Path) -> None:
    store = Store(str(stored))
    with store.open_layer(LAYER, next(iter(store.shards(LAYER)))) as file:
        table, part = file.read(), file.read_row_group(0, ["key", "embeddings"])
    values, index = kind_of(LAYER).decode(table), np.arange(len(table)) % 2
    picked = kind_of(LAYER).pick(table, index)
    assert np.allclose(picked.arrays[0], values[np.arange(len(table)), index], atol=1e-6)
    assert picked.usable.all()
    assert np.array_equal(kind_of(LAYER).decode(part.slice(3, 5).filter(pa.array([True] * 5))), values[3:8])
    assert np.abs(np.linalg.norm(mean_vectors(table)[0].astype(np.float32), axis=1) - 1).max() < 1e-2
    inspect(str(stored), str(tmp_path / "report"), limit=8)
    assert "2 \u00d7 8 pq4" in (tmp_path / "report" / "index.html").read_text()


def test_hugging_face_shows_codes_as_bytes_and_the_card_names_the_codec(stored: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(stored, tmp_path / "copied")
    write_card(str(copied))
    assert "[2, 8] pq4" in (copied / "README.md").read_text()
    rows = datasets.load_dataset(
        str(copied), "embeddings--pq4--images", split="train", cache_dir=str(tmp_path / "cache")
    )
    assert (len(rows), len(rows[0]["embeddings"])) == (300, 8)


def test_published_codes_are_taken_as_they_are(stored: Path, tmp_path: Path) -> None:
    labels = export_labels(str(stored), str(tmp_path / "labels"), layers=["embeddings/pq4"], use_ray=False).output
    assert validate(labels).valid
    assert tree(Path(labels) / "codebooks") == {
        name: content for name, content in tree(stored / "codebooks").items() if "pq4" in name
    }
    values = config(stored.parent, tmp_path / "taken")
    taking = {"lab": {"url": labels, "layers": ["embeddings/pq4"]}}
    taken = reinforce_here({**values, "teachers": {}, "labels": taking}, 64)
    assert validate(taken).valid
    for layer in (LAYER, "embeddings/pq4/caption"):
        for shard in Store(taken).shards(layer):
            with Store(taken).open_layer(layer, shard) as own, Store(labels).open_layer(layer, shard) as theirs:
                assert own.read().equals(theirs.read())
    assert sum(1 for _ in reinforce.open(taken)) == 300


def test_converted_vectors_are_those_of_a_run_byte_for_byte(stored: Path, tmp_path: Path) -> None:
    codecs = {"float16": "float16", "first4": "first4", "pq4": "pq4", "small": "float16-int8", "pca6": "pca6"}
    whole = Path(reinforce_here(config(stored.parent, tmp_path / "whole", **codecs), 64))
    values = config(stored.parent, tmp_path / "converted", float16="float16")
    url = reinforce_here(values, 64)
    for name, codec in [*codecs.items()][1:]:
        found = convert(url, "float16", name, codec, 280, use_ray=False)
        assert found.shards == 6
        assert 0.8 < min(found.cosines.values()) <= 1
        assert not convert(url, "float16", name, codec, 280, use_ray=False).shards
    before, after = tree(whole), tree(Path(url))
    manifests = [json.loads(files.pop("dataset.json")) for files in (before, after)]
    assert after == before
    assert [one["layers"] for one in manifests] == [manifests[0]["layers"]] * 2
    assert validate(url).valid
    assert not make_plan(parse_config(config(stored.parent, Path(url), **codecs))).pending


def test_a_conversion_that_was_stopped_continues_and_keeps_nulls_and_their_reasons(tmp_path: Path) -> None:
    members = [member for member in members_of(0, 40, width=9, height=8) if member[0] != "00000003.txt"]
    write_tar(tmp_path / "source" / "0.tar", members)
    write_tar(tmp_path / "source" / "1.tar", members_of(1, 9))
    url = reinforce_here(config(tmp_path, red="float16"))
    convert(url, "red", "short", "first4", 280, use_ray=False)
    shard = next(iter(Store(url).shards("embeddings/short/caption")))
    files, done = tree(Path(url)), Path(url, "embeddings", "short", "caption", f"{shard}.parquet")
    done.unlink()
    assert convert(url, "red", "short", "first4", 280, use_ray=False).shards == 1
    assert tree(Path(url)) == files
    [row] = Store(url).quarantined("embeddings/short/caption", shard)
    assert (row["key"], row["reason"]) == ("00000003", "no_text")
    assert validate(url).valid


@pytest.mark.parametrize(
    ("teacher", "name", "codec", "message"),
    [
        ("float16", "new", "int8", "stored in float16, from which int8 cannot be made as a run makes it"),
        ("pq4", "new", "pq4", "stored in pq4"),
        ("float16", "rq3", "pq4", "has a layer embeddings/rq3/images already, of another recipe"),
        ("nothing", "new", "pq4", "has no teacher nothing; it has: float16, pca6"),
        ("float16", "float16", "pq4", "another name"),
        ("float16", "a/b", "pq4", "another name"),
        ("float16", "new", "zip", "--codec: there is no codec 'zip'"),
        ("float16", "new", "first9", "--codec: first9: the vectors have 8 numbers"),
    ],
)
def test_what_cannot_be_converted_is_refused(stored: Path, teacher: str, name: str, codec: str, message: str) -> None:
    before = tree(stored)
    with pytest.raises(UserError, match=message):
        convert(str(stored), teacher, name, codec, 280, use_ray=False)
    assert {one: content for one, content in tree(stored).items() if one in before} == before


@pytest.mark.parametrize(
    ("codec", "sample", "message"),
    [
        ("pq3", 280, r"teachers\.red\.codec: pq3: vectors of 8 numbers have no 3 equal parts; choose pq2"),
        ("pca9", 280, r"pca9: the vectors have 8 numbers; choose at most pca8"),
        ("pq4", 255, r"teachers\.red\.codec: pq4 .* 256 .*red/images has 255\. Increase codec_sample .* or .* int8\."),
    ],
)
def test_a_codec_that_does_not_fit_the_vectors_or_their_number_is_refused(
    stored: Path, tmp_path: Path, codec: str, sample: int, message: str
) -> None:
    values = config(stored.parent, tmp_path / "out", red=codec)
    values["teachers"]["red"]["codec_sample"] = sample
    with pytest.raises(UserError, match=message):
        reinforce_here(values, 64)


def test_a_layer_without_a_vector_has_too_few_for_a_codebook(tmp_path: Path) -> None:
    members = [member for member in members_of(0, 140, width=9, height=8) if not member[0].endswith(".txt")]
    write_tar(tmp_path / "source" / "00000.tar", members)
    with pytest.raises(UserError, match=r"256 .* embeddings/red/caption has 0\. Name a larger source, or choose"):
        reinforce_here({**config(tmp_path, red="pq4"), "captioners": {}}, 64)


def test_a_codec_without_its_encoder_ends_a_run_and_not_the_reading(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = shutil.copytree(stored, tmp_path / "copied")
    shutil.rmtree(copied / "embeddings" / "pq4" / "images")
    monkeypatch.setattr("reinforce.processes.imports.installed", lambda package: package != "faiss")
    with pytest.raises(UserError, match=r"codec pq4 needs faiss: run pip install -e '\.\[select\]'"):
        reinforce_here(config(stored.parent, copied), 64)
    assert sum(1 for _ in reinforce.open(str(stored))) == 300


def test_no_rows_are_encoded_and_decoded_and_more_than_a_gibibyte_is_refused(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(stored))
    for name in FITTED:
        layer = f"embeddings/{name}/images"
        with store.open_layer(layer, next(iter(store.shards(layer)))) as file:
            table = file.read()
        assert kind_of(layer).decode(table.slice(0, 0)).shape == (0, 2, 8)
        book = codebook_of(table.schema.metadata)
        assert book.encode(np.zeros((0, 2, 8), np.float32)).shape == (0, *table["embeddings"].type.shape)
        with monkeypatch.context() as patch:
            patch.setattr("reinforce.dataset.codecs.codebooks._MOST_BYTES", 100 * 2 * 8 * 4 - 1)
            with pytest.raises(ValueError, match="200 codes of vectors of 8 numbers in a row group"):
                kind_of(layer).decode(table)


def test_another_sample_is_another_recipe(stored: Path) -> None:
    values = config(stored.parent)
    values["teachers"]["pq4"]["codec_sample"] = 281
    with pytest.raises(UserError, match=r"codebook\.sample: 280 in the dataset, 281 in this config"):
        make_plan(parse_config(values))


def test_names_of_codecs_have_bytes() -> None:
    for name, size in {"pq96": 96, "rq32": 32, "pca128": 128, "float16": 1536, "int8": 772, "first256": 512}.items():
        assert find_codec(name).bytes(768) == size
    assert path_of(LAYER) == ("codebooks", f"{LAYER}.safetensors")


def test_residual_codes_are_nearer_than_those_of_the_nearest_vector_one_after_the_other() -> None:
    rng = np.random.default_rng(0)
    every = rng.standard_normal((2024, 16)).astype(np.float32)
    every /= np.linalg.norm(every, axis=1, keepdims=True)
    sample, values = every[:1024], every[1024:]
    codec = find_fitted("rq4")
    arrays = codec.fit(sample, 0)
    found = codec.decode(codec.encode(values, arrays), arrays)
    rest = values.copy()
    for book in arrays["codebook"]:
        rest -= book[((rest[:, None] - book) ** 2).sum(axis=2).argmin(axis=1)]
    assert ((values - found) ** 2).sum(axis=1).mean() < 0.95 * (rest**2).sum(axis=1).mean()


def test_principal_components_have_one_sign_and_codes_are_the_nearest_steps() -> None:
    rng = np.random.default_rng(0)
    codec = find_fitted("pca6")
    for _ in range(10):
        sample = rng.standard_normal((300, 8)).astype(np.float32)
        arrays = codec.fit(sample, 0)
        basis = arrays["basis"]
        assert (basis[np.arange(6), np.abs(basis).argmax(axis=1)] > 0).all()
        steps = (sample - arrays["mean"]) @ basis.T / arrays["steps"]
        assert np.abs(codec.encode(sample, arrays) - 128.0 - steps).max() < 0.501


def test_a_channel_of_equal_values_is_standardised_by_one() -> None:
    sample = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    sample[:, 3] = 2.5
    codec = Standardised(find_codec("float16"))
    arrays = codec.fit(sample, 0)
    assert arrays[DEVIATION][3] == 1
    codes = codec.encode(sample, arrays)
    assert (codes[:, 3] == 0).all()
    assert np.isfinite(codes).all()


@pytest.mark.parametrize("name", ["pq4", "rq3"])
def test_a_seed_gives_its_own_codebook(name: str) -> None:
    sample = np.random.default_rng(0).standard_normal((1024, 8)).astype(np.float32)
    codec = find_fitted(name)
    first, again, other = (codec.fit(sample, seed)["codebook"] for seed in (2, 2, 3))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
