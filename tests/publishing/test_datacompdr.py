"""Exported tars: read back as reinforcements, read as ml-mobileclip's trainer does, refused where they would lie."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import _apply_op
from torchvision.transforms.functional import resized_crop

import reinforce
from reinforce.dataset.store import Store
from reinforce.dataset.vectors import normalized as unit
from reinforce.errors import UserError
from reinforce.images.records import OPS
from reinforce.publishing import datacompdr as datacompdr_shard
from reinforce.publishing.datacompdr import Exported, export_datacompdr
from reinforce.publishing.embeddings import export_embeddings
from reinforce.publishing.labels import export_labels
from tests.helpers.data import config_of, members_of, picture, tree, write_tar
from tests.helpers.images import encode
from tests.helpers.reinforced import manifest_to_change, reinforce_here
from tests.helpers.views import make_view


def export(folder: Path, output: Path | None = None, **options: Any) -> Exported:
    return export_datacompdr(str(folder / "out"), str(output or folder / "tars"), use_ray=False, **options)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``out``, the dataset of ``write_dataset``."""
    folder = tmp_path_factory.mktemp("plain")
    write_dataset(folder)
    return folder


def write_dataset(folder: Path, *extra: tuple[str, bytes], **changes: Any) -> None:
    """A dataset of two shards; ``extra`` are further members of the first one."""
    for number, size in enumerate((5, 3)):
        write_tar(folder / "source" / f"{number:05d}.tar", members_of(number, size) + list(extra) * (number == 0))
    reinforce_here(config_of(f"{folder}/source/*.tar", folder / "out", **changes))


def read_back(folder: Path, source: str, join: str = "key") -> list[reinforce.Sample]:
    """The samples of ``tars`` in a dataset that reads them as published reinforcements of ``source``."""
    described = json.loads((folder / "tars" / "config.json").read_text())["reinforced_dataset"]
    teachers = {
        one["name"]: {
            "family": "published", "model": one["name"], "columns": one["columns"], "logit_scale": 50,
            "codec": "float32",
        }
        for one in described["teachers"]
    }  # fmt: skip
    captioners = {
        name: {"family": "published", "model": one["list"], "captions": one["captions"]}
        for name, one in described["captioners"].items()
    }
    own = {"reinforcements": f"{folder}/tars/*.tar", "join": join, "teachers": teachers, "captioners": captioners}
    return list(reinforce.open(reinforce_here(config_of(source, folder / "back", **own))))


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 4e-3)])
def test_reading_an_export_as_reinforcements_gives_the_same_dataset(
    tmp_path: Path, precision: Any, tolerance: float
) -> None:
    write_dataset(tmp_path, teachers={**config_of("", "")["teachers"], "more": {
        "class": "tests.helpers.models:ColorTeacher", "options": {"size": 16, "dim": 4, "seed": 2}, "codec": "int8",
    }})  # fmt: skip
    exported = export(tmp_path, precision=precision, images=False, teachers=["blue", "more", "red"])
    assert (exported.shards, exported.samples, exported.left_out) == (2, 8, {})
    # The file names are those of the shards, which the source's file names are part of: they are paired by them.
    back = read_back(tmp_path, f"{tmp_path}/source/*.tar")
    for one, other in zip(reinforce.open(str(tmp_path / "out")), back, strict=True):
        assert (one.key, one.caption, one.metadata) == (other.key, other.caption, other.metadata)
        assert (one.captions, one.augmentations) == (other.captions, other.augmentations)
        assert other.images.keys() == {"blue", "more", "red"}
        for teacher in one.images:
            # Reading normalises again what was rounded for storage.
            np.testing.assert_allclose(other.images[teacher], unit(one.images[teacher]), atol=tolerance)
            for texts in ("caption", "namer"):
                np.testing.assert_allclose(other.texts[teacher][texts], unit(one.texts[teacher][texts]), atol=tolerance)
        np.testing.assert_array_equal(one.augmented(1), other.augmented(1))


def test_dfndrs_layout_has_urls_alone_and_is_joined_by_them(tmp_path: Path) -> None:
    write_dataset(tmp_path, *signed_sample("private"))
    exported = export(tmp_path, layout="dfndr")
    reason = "it has no URL that is public, which is all that this layout states of an image"
    assert (exported.samples, exported.left_out) == (8, {reason: 1})
    extensions = {name.partition(".")[2] for name in member_names(tmp_path / "tars")}
    assert extensions == {"url.txt", "syn.json", "paug.json", "npz"}
    kept = [sample for sample in reinforce.open(str(tmp_path / "out")) if sample.key != "private"]
    back = read_back(tmp_path, f"{tmp_path}/source/*.tar", "url")
    assert [(one.key, one.captions, one.augmentations) for one in back] == [
        (one.key, one.captions, one.augmentations) for one in kept
    ]
    for one, other in zip(kept, back, strict=True):
        np.testing.assert_allclose(other.images["red"], unit(one.images["red"]), atol=1e-6)


def signed_sample(key: str) -> list[tuple[str, bytes]]:
    """Members of a sample whose metadata has secrets."""
    stated = {"url": "https://me:pass@e.org/a?sig=1", "api_key": "abc", "from": ["s3://user:word@b/c"], "n": 1}
    return [(f"{key}.png", picture(60)), (f"{key}.txt", b"x"), (f"{key}.json", json.dumps(stated).encode())]


def test_no_secret_of_the_metadata_and_no_local_path_is_published(tmp_path: Path) -> None:
    write_dataset(tmp_path, *signed_sample("private"))
    stored = tmp_path / "out" / "dataset.json"
    manifest = manifest_to_change(stored.parent)
    for models, name in (("teachers", "red"), ("captioners", "namer")):
        manifest[models][name]["model"] = "local-dir:/home/me/model"
    stored.write_text(json.dumps(manifest))
    export(tmp_path)
    config = (tmp_path / "tars" / "config.json").read_text()
    assert "home" not in config
    assert config.count('"model": "(local path)"') == 2
    [path] = (tmp_path / "tars").glob("00000-*.tar")
    with tarfile.open(path) as tar:
        url, stated = (tar.extractfile(f"private.{name}").read() for name in ("url.txt", "json"))  # type: ignore[union-attr]
    public = {"url": "https://e.org/a", "api_key": "(secret)", "from": ["s3://b/c"], "n": 1, "uid": "private"}
    assert (url, json.loads(stated)) == (b"https://e.org/a", public)
    export_embeddings(str(tmp_path / "out"), str(tmp_path / "vectors"), teacher="red", use_ray=False)
    assert "https://e.org/a" in pq.read_table(tmp_path / "vectors" / "metadata")["url"].to_pylist()


def test_labels_without_images_give_the_tars_of_their_dataset(plain: Path, tmp_path: Path) -> None:
    export_labels(str(plain / "out"), str(tmp_path / "out"), use_ray=False)
    export(plain, tmp_path / "expected", images=False)
    with pytest.raises(UserError, match=r"has labels without images. Add --no-images.$"):
        export(tmp_path)
    export(tmp_path, images=False)
    assert tree(tmp_path / "tars") == tree(tmp_path / "expected")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_published_trainer_can_read_an_export(plain: Path, tmp_path: Path, precision: Any) -> None:
    exported = export(plain, tmp_path / "tars", precision=precision, teachers=["red", "blue"])
    assert " --distill-teacher-dimension 8 12 " in exported.lines()[-1]
    assert exported.lines()[-1].endswith(" --distill-loss-weights 0.0 1.0 --distill-average-after-softmax")
    config = json.loads((tmp_path / "tars" / "config.json").read_text())["reinforce"]["image_augmentation"]
    assert config["random_resized_crop"] == {"interpolation": "bicubic", "size": 24}
    assert (config["rand_augment"]["num_ops"], {"normalize"} <= config.keys()) == (2, True)
    urls = sorted(str(path) for path in (tmp_path / "tars").glob("*.tar"))
    pipeline = webdataset.WebDataset(urls, shardshuffle=False).decode("pilrgba").rename(image="jpg;png", text="txt")
    samples = list(reinforce.open(str(plain / "out")))
    for sample, read in zip(samples, pipeline, strict=True):
        assert (read["__key__"], read["text"]) == (sample.key, sample.caption)
        assert [key for key in read["syn.json"] if key.startswith("syn_text")] == ["syn_text_namer"]
        assert read["syn.json"]["syn_text_namer"] == sample.captions["namer"]
        arrays = read["npz" if precision == "fp32" else "pth.gz"]
        rows = {name: len(arrays[name]) for name in ("image_emb", "text_emb", "syn_text_namer_emb")}
        assert rows == {"image_emb": 2, "text_emb": 1, "syn_text_namer_emb": 2}  # no second text_emb: it would be read
        vector = torch.as_tensor(arrays["image_emb"][1]).type(torch.float32)
        joined = np.concatenate([sample.images["red"][1], sample.images["blue"][1]])
        np.testing.assert_allclose(vector, joined, atol=1e-6 if precision == "fp32" else 4e-3)
        (top, left, height, width), ops = read["paug.json"]["param_aug"][1]  # a list, not a text with one
        assert vars(sample.augmentations[1].crop) == {"top": top, "left": left, "height": height, "width": width}
        assert [(OPS[index], magnitude) for index, magnitude in ops] == [
            (op.name, op.magnitude) for op in sample.augmentations[1].ops or ()
        ]
        image = read["image"].convert("RGB")
        image = resized_crop(image, top, left, height, width, [24, 24], InterpolationMode.BICUBIC)
        for index, magnitude in ops:
            image = _apply_op(image, OPS[index], magnitude, InterpolationMode.NEAREST, None)
        assert image.tobytes() == sample.augmented(1).tobytes()


def test_an_export_is_repeatable_and_resumed(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for precision in ("fp32", "bf16"):
        for name in ("first", "second"):
            export(plain, tmp_path / f"{precision}-{name}", precision=precision)
        first = tree(tmp_path / f"{precision}-first")
        assert first == tree(tmp_path / f"{precision}-second")
        assert len(first) == 5  # two tars with their counts, and config.json

    written, broken = [], datacompdr_shard._npz

    def fail_late(arrays: Any) -> bytes:
        written.append(arrays)
        if len(written) == 7:
            raise UserError("the disk is gone")
        return broken(arrays)

    monkeypatch.setattr(datacompdr_shard, "_npz", fail_late)
    with pytest.raises(UserError, match="the disk is gone"):
        export(plain, tmp_path / "tars")
    assert len([*(tmp_path / "tars").glob("*.tar")]) == 1
    assert not [*(tmp_path / "tars" / ".tmp").glob("reinforce-*")]
    exported = export(plain, tmp_path / "tars")
    assert (exported.shards, exported.kept, exported.samples) == (2, 1, 8)
    assert tree(tmp_path / "tars") == tree(tmp_path / "fp32-first")
    with pytest.raises(UserError, match=r"an export with other vectors\. Repeat the options"):
        export(plain, tmp_path / "tars", precision="bf16")


def rotated() -> bytes:
    """An image that policy rgb-1 turns, and readers of the format do not."""
    image = Image.open(io.BytesIO(picture(1)))
    exif = image.getexif()
    exif[0x0112] = 6
    return encode(image, "JPEG", exif=exif)


def half_transparent(alpha: int) -> bytes:
    image = Image.open(io.BytesIO(picture(2))).convert("RGBA")
    image.putalpha(alpha)
    return encode(image, "PNG")


def test_images_that_readers_would_decode_otherwise_are_converted_or_left_out(tmp_path: Path) -> None:
    extra = [("turned.jpg", rotated()), ("turned.txt", b"a"), ("glass.png", half_transparent(9)), ("glass.txt", b"b")]
    extra += [("opaque.png", half_transparent(255)), ("opaque.txt", b"c"), ("silent.png", picture(3))]
    extra += [("old.bmp", picture(5, format_="BMP")), ("old.txt", b"d")]
    extra += [("../../up/a b.png", picture(4)), ("../../up/a b.txt", b"d")]
    write_dataset(tmp_path, *extra)
    exported = export(tmp_path)
    assert (exported.left_out, exported.samples, exported.converted) == ({}, 14, 3)
    assert "converted: 3 images, to PNGs that decode to the same pixels" in exported.lines()
    names = member_names(tmp_path / "tars", "00000-*.tar")
    assert {"turned.png", "glass.png", "opaque.png", "old.png"} <= {*names}
    assert {name for name in names if name.startswith("silent")} == {
        "silent.png", "silent.syn.json", "silent.paug.json", "silent.npz", "silent.json",
    }  # fmt: skip
    assert "%2E%2E/%2E%2E/up/a b.png" in names, "no name leads out of the folder in which a tar is unpacked"
    # With images in the tars, an export is a source and its reinforcements.
    back = read_back(tmp_path, f"{tmp_path}/tars/*.tar")
    assert [sample.caption for sample in back if sample.key == "silent"] == [None]
    for one, other in zip(reinforce.open(str(tmp_path / "out")), back, strict=True):
        assert other.augmented(1).tobytes() == one.augmented(1).tobytes()

    without = export(tmp_path, tmp_path / "without", images=False)
    [(reason, count)] = without.left_out.items()
    assert (count, without.samples, without.converted) == (2, 12, 0)
    assert reason.startswith("image policy rgb-1 gives other pixels than pillow-rgb-1")
    assert f"left out: 2 samples, {reason}" in without.lines()
    [stats] = [json.loads(path.read_text()) for path in (tmp_path / "without").glob("00000-*_stats.json")]
    assert stats["left_out"][reason]["keys"] == ["turned", "glass"]


def test_images_by_reference_are_read_from_folders_that_are_named(tmp_path: Path) -> None:
    write_dataset(tmp_path, images="reference")
    with pytest.raises(UserError, match=rf"add --images-from {tmp_path}/source"):
        export(tmp_path)
    assert export(tmp_path, images_from=[f"{tmp_path}/source"]).samples == 8
    assert len([name for name in member_names(tmp_path / "tars") if name.endswith(".png")]) == 8
    notes = export(tmp_path, tmp_path / "without", images=False).notes
    assert len(notes) == 1
    assert notes[0].startswith("images were not read: readers of the format decode by pillow-rgb-1")


def test_of_a_view_only_its_samples_are_exported(plain: Path, tmp_path: Path) -> None:
    url = str(shutil.copytree(plain / "out", tmp_path / "out"))
    view = make_view(url, "key LIKE '0000000_'")
    exported = export(tmp_path, view="some", images=False)
    assert (exported.shards, exported.samples) == (1, 5), "the other shard has no sample of the view"
    found = {name.partition(".")[0] for name in member_names(tmp_path / "tars")}
    assert found == {sample.key for sample in reinforce.open(url, view="some")}
    recorded = json.loads((tmp_path / "tars" / "config.json").read_text())["reinforced_dataset"]["view"]
    assert recorded == {"name": "some", "fingerprint": view.fingerprint}


def member_names(folder: Path, pattern: str = "*.tar") -> list[str]:
    """The names of the members of tars, none of which has a time."""
    names = []
    for path in folder.glob(pattern):
        with tarfile.open(path) as tar:
            assert {entry.mtime for entry in tar.getmembers()} == {0}
            names += tar.getnames()
    return names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augmentations": {"backend": "fixed-point-1", "size": 24}}, "augmentation backend fixed-point-1"),
        ({"input": {"reduce_to": 8}}, "image policy rgb-1-reduced-8"),
        ({"augmentations": {"rand_augment": {"ops": 17}, "size": 24}}, "has 17 operations in a record"),
    ],
)
def test_a_policy_that_the_format_cannot_hold_is_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_dataset(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        export(tmp_path)
    assert not (tmp_path / "tars").exists()
    if "fixed-point-1" in message:
        assert export(tmp_path, approximate=True).samples == 8


def test_folders_of_the_dataset_and_teachers_whose_vectors_do_not_fit_together_are_refused(
    plain: Path, tmp_path: Path
) -> None:
    for output in (plain / "out", plain / "out" / "samples"):
        with pytest.raises(UserError, match=r"is in the dataset\. Give another folder"):
            export(plain, output)
    for teachers, message in (([], "name at least one teacher"), (["green"], "has no teacher 'green'")):
        with pytest.raises(UserError, match=message):
            export(plain, tmp_path / "tars", teachers=teachers)
    shutil.copytree(plain / "out", tmp_path / "out")
    manifest = tmp_path / "out" / "dataset.json"
    document = manifest_to_change(manifest.parent)
    del document["layers"]["embeddings/red/namer"]
    manifest.write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"has no embeddings/red/namer, and the format holds vectors of all teachers"):
        export(tmp_path)
    assert not (tmp_path / "tars").exists()
    assert export(tmp_path, teachers=["blue"]).samples == 8
    del document["layers"]["embeddings/blue/caption"]
    manifest.write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"`reinforce export labels` publishes datasets without vectors of true"):
        export(tmp_path, tmp_path / "other", teachers=["blue"])


def test_of_several_captions_the_first_is_written_and_a_note_says_so(tmp_path: Path) -> None:
    texts = json.dumps({"captions": ["one", "two"]}).encode()
    write_tar(tmp_path / "source" / "0.tar", [("0.png", picture(0)), ("0.json", texts)])
    reading = {"captions": ["json:captions"], "captions_per_sample": 2}
    reinforce_here(config_of(f"{tmp_path}/source/*.tar", tmp_path / "out", input=reading))
    exported = export(tmp_path)
    assert any("of several true captions of a sample, the format has the first alone" in one for one in exported.notes)
    with tarfile.open(next((tmp_path / "tars").glob("*.tar"))) as tar:
        [name] = [name for name in tar.getnames() if name.endswith(".txt") and "url" not in name]
        found = tar.extractfile(name)
        assert found is not None
        assert found.read() == b"one"


def write_captions(path: Path, reverse: bool = False) -> str:
    """Ten samples without a caption, which come first, and six with one to three, or with these in another order."""
    members = []
    for number in range(16):
        texts = [f"{word} {number}" for word in ("one", "two", "three")[: number % 3 + 1]] if number >= 10 else []
        texts = texts[:: -1 if reverse else 1]
        stated = {"uid": f"uid{number}", "texts": texts, "first": texts[:1]}
        members += [(f"{number:02d}.png", picture(number)), (f"{number:02d}.json", json.dumps(stated).encode())]
        members += [(f"{number:02d}.txt", texts[0].encode())] if texts else []
    return str(write_tar(path, members))


@pytest.mark.parametrize("own", [True, False])  # whether the source is the dataset's, or the tars themselves
@pytest.mark.parametrize("captions", [1, 2, 3])
def test_several_captions_and_none_are_read_back_from_an_export(tmp_path: Path, captions: int, own: bool) -> None:
    source = write_captions(tmp_path / "source" / "0.tar")
    several = {"captions": ["json:texts"], "captions_per_sample": captions}
    reinforce_here(config_of(source, tmp_path / "out", input=several if captions > 1 else {}))
    export(tmp_path, images=not own)
    back = read_back(tmp_path, source if own else f"{tmp_path}/tars/*.tar")
    for one, other in zip(reinforce.open(str(tmp_path / "out")), back, strict=True):
        assert (one.key, one.caption, one.captions) == (other.key, other.caption, other.captions)
        assert (one.caption is None) == np.isnan(other.texts["red"]["caption"]).all()
        np.testing.assert_allclose(other.images["red"], unit(one.images["red"]), atol=1e-6)
        expected = unit(one.texts["red"]["caption"][:1])
        np.testing.assert_allclose(other.texts["red"]["caption"], expected, atol=1e-6, equal_nan=True)
    assert reasons(tmp_path / "back", "embeddings/red/caption") == {(f"{n:02d}", "no_text") for n in range(10)}


def test_a_vector_of_another_caption_than_the_samples_is_not_read_back(tmp_path: Path) -> None:
    source = write_captions(tmp_path / "source" / "0.tar")
    several = {"captions": ["json:texts"], "captions_per_sample": 3}
    reinforce_here(config_of(source, tmp_path / "out", input=several))
    export(tmp_path, images=False)
    own = {other.key: other for other in read_back(tmp_path, write_captions(tmp_path / "source" / "0.tar", True))}
    others = {f"{number}" for number in range(10, 16) if number % 3}  # whose first caption is not the exported one
    layer = "embeddings/red/caption"
    assert {key for key, reason in reasons(tmp_path / "back", layer) if reason == "not_reinforced"} == others
    for one in reinforce.open(str(tmp_path / "out")):
        kept = one.caption is not None and one.key not in others
        assert kept == np.isfinite(own[one.key].texts["red"]["caption"]).all()
        assert not kept or own[one.key].caption == one.caption


def reasons(dataset: Path, layer: str) -> set[tuple[str | None, str]]:
    store = Store(str(dataset))
    rows = [row for shard in store.shards(f"quarantine/{layer}") for row in store.quarantined(layer, shard)]
    return {(row["key"], str(row["reason"])) for row in rows}


def test_an_operation_that_the_format_does_not_have_is_named_and_null_vectors_leave_a_sample_out(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(datacompdr_shard, "OPS", OPS[:3])
        with pytest.raises(UserError, match=r"shard 00000-\w+, key 000000\d+: the format has no operation '\w+'; it"):
            export(plain, tmp_path)
    assert not [*tmp_path.glob("*.tar")]
    rows = datacompdr_shard._rows

    def with_null(*arguments: Any) -> Any:
        for key, row in rows(*arguments):
            if key == "00000002":
                row["arrays"]["image_emb"] = np.full_like(row["arrays"]["image_emb"], np.nan)
            yield key, row

    monkeypatch.setattr(datacompdr_shard, "_rows", with_null)
    assert export(plain, tmp_path).left_out == {"null in the dataset: image_emb": 1}
