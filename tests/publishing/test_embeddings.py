"""Vectors as clip-retrieval and autofaiss read them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

import reinforce
from reinforce.dataset.vectors import normalized as unit
from reinforce.errors import UserError
from reinforce.publishing.embeddings import ExportedVectors, export_embeddings
from reinforce.storage import Storage
from tests.helpers.commands import Command
from tests.helpers.data import config_of, members_of, picture, tree, write_tar
from tests.helpers.reinforced import reinforce_here
from tests.helpers.views import make_view


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of two shards; one sample has no caption. The teacher encodes texts and images to random directions."""
    folder = tmp_path_factory.mktemp("vectors")
    write_tar(folder / "source" / "00000.tar", [*members_of(0, 5), ("silent.png", picture(9))])
    write_tar(folder / "source" / "00001.tar", members_of(1, 3))
    return reinforce_here(config_of(f"{folder}/source/*.tar", folder / "out"))


def export(dataset: str, output: Path, **options: Any) -> ExportedVectors:
    return export_embeddings(dataset, str(output), use_ray=False, **options)


def read(folder: Path, name: str) -> np.ndarray:
    """The arrays of a folder in the order of their names, as embedding_reader reads them."""
    return np.concatenate([np.load(path) for path in sorted((folder / name).glob("*.npy"))])


def test_rows_of_images_texts_and_metadata_belong_together(dataset: str, tmp_path: Path) -> None:
    found = export(dataset, tmp_path, teacher="red")
    assert (found.parts, found.rows, found.left_out) == (2, 8, 1)
    assert "left out: 1 sample without a vector or text" in found.lines()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*_*.*")) == [
        *(f"img_emb/img_emb_{n}.npy" for n in range(2)),
        *(f"metadata/metadata_{n}.parquet" for n in range(2)),
        *(f"text_emb/text_emb_{n}.npy" for n in range(2)),
    ]
    images, texts = (read(tmp_path, name) for name in ("img_emb", "text_emb"))
    table = pandas.read_parquet(tmp_path / "metadata")
    assert (images.dtype, images.shape, texts.shape, len(table)) == (np.float16, (8, 8), (8, 8), 8)
    samples = [sample for sample in reinforce.open(dataset) if sample.caption is not None]
    for sample, image, text, (_, row) in zip(samples, images, texts, table.iterrows(), strict=True):
        assert (row["image_path"], row["caption"], row["width"]) == (sample.key, sample.caption, sample.width)
        assert row["url"] == f"https://example.org/{sample.key}"
        np.testing.assert_allclose(image, unit(sample.images["red"].mean(axis=0)), atol=1e-3)
        np.testing.assert_allclose(text, unit(sample.texts["red"]["caption"][0]), atol=1e-3)


def test_of_a_view_only_its_samples_are_exported(dataset: str, tmp_path: Path) -> None:
    url = str(shutil.copytree(dataset, tmp_path / "dataset"))
    # The second shard has no sample of the view.
    make_view(url, "key IN ('00000001', 'silent')")
    found = export(url, tmp_path / "out", teacher="red", texts="none", view="some")
    assert (found.parts, found.rows) == (1, 2)
    table = pandas.read_parquet(tmp_path / "out" / "metadata")
    assert [*table["image_path"]] == ["00000001", "silent"]
    assert export(url, tmp_path / "out", teacher="red", texts="none", view="some").kept == 1, "it is resumed"
    with pytest.raises(UserError, match="has an export with other shards, shard_names, view"):
        export(url, tmp_path / "out", teacher="red", texts="none")
    with pytest.raises(UserError, match="has no view 'best'; it has: some"):
        export(url, tmp_path / "other", teacher="red", view="best")


def test_options_choose_augmentation_caption_and_type(dataset: str, tmp_path: Path, command: Command) -> None:
    words = ["export", "embeddings", dataset, str(tmp_path), "--teacher", "blue", "--texts", "namer", "--no-ray"]
    assert command(*words, "--image", "1", "--text", "1", "--dtype", "float32")[0] == 0
    images, texts = (read(tmp_path, name) for name in ("img_emb", "text_emb"))
    table = pandas.read_parquet(tmp_path / "metadata")
    samples = list(reinforce.open(dataset))
    assert (images.dtype, len(images)) == (np.float32, len(samples))  # each has synthetic captions
    for sample, image, text, caption in zip(samples, images, texts, table["caption"], strict=True):
        np.testing.assert_allclose(image, unit(sample.images["blue"][1]), atol=1e-6)
        np.testing.assert_allclose(text, unit(sample.texts["blue"]["namer"][1]), atol=1e-6)
        assert caption == (sample.captions["namer"] or [])[1]
    export(dataset, tmp_path / "images", teacher="blue", texts="none")
    assert len(read(tmp_path / "images", "img_emb")) == 9
    assert not (tmp_path / "images" / "text_emb").exists()


def test_an_export_is_resumed(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(dataset, tmp_path / "whole", teacher="red")
    write = Storage.write_bytes

    def fail_late(output: Storage, content: bytes, *parts: str) -> None:
        if parts == ("text_emb", "text_emb_1.npy"):
            raise UserError("the disk is gone")
        write(output, content, *parts)

    monkeypatch.setattr(Storage, "write_bytes", fail_late)
    with pytest.raises(UserError, match="the disk is gone"):
        export(dataset, tmp_path / "cut", teacher="red")
    monkeypatch.undo()
    found = export(dataset, tmp_path / "cut", teacher="red")
    assert (found.parts, found.kept, found.rows, found.left_out) == (2, 1, 8, 1)
    assert tree(tmp_path / "whole") == tree(tmp_path / "cut")
    with pytest.raises(UserError, match=r"an export with other image\. Repeat the options"):
        export(dataset, tmp_path / "cut", teacher="red", image=0)
    assert json.loads((tmp_path / "cut" / "embeddings.json").read_text())["image"] == "average"


def test_what_is_not_there_is_named(dataset: str, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "has teachers red, blue: choose one by --teacher"),
        ({"teacher": "red", "texts": "coca"}, "has no captioner 'coca'"),
        ({"teacher": "red", "image": 2}, r"--image: embeddings/red/images has vectors 0 to 1, not 2"),
        ({"teacher": "red", "texts": "namer", "text": 7}, r"--text: embeddings/red/namer has vectors 0 to 1, not 7"),
    ]
    for options, message in cases:
        with pytest.raises(UserError, match=message):
            export(dataset, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", [0, 2, "average"])
@pytest.mark.parametrize("codec", ["float16-int8", "first4", "first4-int8", "pca4"])
def test_of_several_captions_and_none_each_codec_is_exported_as_it_is_decoded(
    tmp_path: Path, codec: str, text: Any
) -> None:
    members: list[tuple[str, bytes]] = []
    for number in range(18):
        texts = [f"{word} {number}" for word in ("one", "two", "three")][: number % 4]
        members += [(f"{number:02d}.png", picture(number))]
        members += [(f"{number:02d}.txt", "\n".join(texts).encode())] if texts else []
    source = str(write_tar(tmp_path / "source.tar", members))
    red = {**config_of("", "")["teachers"]["red"], "codec": codec, "codec_sample": 16}
    reading = {"captions_per_sample": 3}
    dataset = reinforce_here(config_of(source, tmp_path / "out", input=reading, teachers={"red": red}))
    found = export(dataset, tmp_path / "vectors", text=text, image=1, dtype="float32")
    samples = [sample for sample in reinforce.open(dataset) if sample.caption is not None]
    assert (found.rows, found.left_out) == (len(samples), 18 - len(samples)) == (13, 5)
    images, texts_of = (read(tmp_path / "vectors", name) for name in ("img_emb", "text_emb"))
    captions = pandas.read_parquet(tmp_path / "vectors" / "metadata")["caption"]
    for sample, image, vector, caption in zip(samples, images, texts_of, captions, strict=True):
        own = sample.texts["red"]["caption"][: len(sample.true_captions)]  # the others are these again
        at = 0 if text == "average" else text % len(own)
        assert caption == sample.true_captions[at]
        np.testing.assert_allclose(image, unit(sample.images["red"][1]), atol=1e-6)
        np.testing.assert_allclose(vector, unit(own.mean(axis=0) if text == "average" else own[at]), atol=1e-6)
