"""Labels without images: a dataset that all commands read, and in which nothing is private."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

import reinforce
from reinforce.dataset.store import MANIFEST, Store
from reinforce.dataset.validate import validate
from reinforce.errors import UserError
from reinforce.labels.index import open_index
from reinforce.publishing import labels
from reinforce.publishing.labels import ExportedLabels, export_labels
from reinforce.publishing.shards import public_url, without_paths
from tests.helpers.commands import Printed
from tests.helpers.data import config_of, members_of, picture, tree, write_tar
from tests.helpers.reinforced import reinforce_here
from tests.helpers.views import make_view

PRIVATE = {
    "signed": "https://bucket.s3.amazonaws.com/a.jpg?X-Amz-Signature=abc&X-Amz-Credential=AKIA",
    "user": "https://me:hunter2@example.org/a.jpg",
    "local": "/home/me/secret/a.jpg",
    "file": "file:///home/me/secret/a.jpg",
    "intranet": "http://10.1.2.3/a.jpg",
    "host": "http://storage/a.jpg",
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two shards, one with URLs that are private and a sample without a caption, and a teacher with a local path."""
    folder = tmp_path_factory.mktemp("labels")
    write_tar(folder / "source" / "00000.tar", members_of(0, 9))
    members = [("silent.png", picture(99))]
    for number, (name, url) in enumerate(PRIVATE.items()):
        document = {"uid": f"{number:032x}", "sha256": "ab" * 32, "url": url}
        members += [(f"{name}.png", picture(50 + number)), (f"{name}.json", json.dumps(document).encode())]
    write_tar(folder / "source" / "00001.tar", members)
    teachers = dict(config_of("", "")["teachers"])
    return config_of(f"{folder}/source/*.tar", folder / "out", teachers=teachers)


@pytest.fixture(scope="module")
def dataset(config: dict[str, Any]) -> str:
    url = reinforce_here(config)
    manifest = Path(url, MANIFEST)  # a setting of a model that is a path of this machine
    content = json.loads(manifest.read_text())
    content["teachers"]["blue"]["model"]["options"]["weights"] = "/home/me/blue.safetensors"
    manifest.write_text(json.dumps({key: value for key, value in content.items() if key != "digest"}))
    return url


@pytest.fixture(scope="module")
def published(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("published") / "labels"
    export(dataset, output, licence="cc-by-4.0")
    return output


def export(dataset: str, output: Path, **options: Any) -> ExportedLabels:
    return export_labels(dataset, str(output), use_ray=False, **options)


def stamps(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_mtime_ns for name in tree(folder)}


def test_labels_are_the_dataset_without_its_images(
    dataset: str, published: Path, printed: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, data = reinforce.open(dataset), reinforce.open(str(published))
    assert data.layers == own.layers
    assert data.fingerprints == own.fingerprints
    for sample, label in zip(own, data, strict=True):
        assert (label.key, label.caption, label.augmentations) == (sample.key, sample.caption, sample.augmentations)
        assert label.captions == sample.captions
        for teacher in own.teachers:
            np.testing.assert_array_equal(label.images[teacher], sample.images[teacher])
            for texts in ("caption", "namer"):
                np.testing.assert_array_equal(label.texts[teacher][texts], sample.texts[teacher][texts])
        assert (label.image, label.metadata) == (b"", None)
    with pytest.raises(UserError, match="these are published labels"):
        label.pil()
    assert validate(str(published)).findings == []
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # charts, which take long, are those of other reports
    printed("status", str(published))
    printed("inspect", str(published), str(published.parent / "report"))


def test_every_row_states_its_image_and_is_found_by_it(dataset: str, published: Path) -> None:
    index = open_index(Store(str(published)))
    assert index.kinds == {"uid": 15, "sha256": 6, "digest": 16, "url": 9, "key": 1}
    digests = [int(hashlib.blake2b(one.image, digest_size=8).hexdigest(), 16) for one in reinforce.open(dataset)]
    stated = np.array(digests, ">u8").view("<u8")
    assert pq.read_table(published / "samples")["image_digest"].to_pylist() == stated.tolist()


def test_nothing_that_is_private_leaves(dataset: str, published: Path, tmp_path: Path) -> None:
    result = export(dataset, tmp_path / "again")
    assert "left out: url of 6: they have a password or signature, or are no public web address" in result.lines()
    assert "local paths are hidden in the settings of teachers.blue" in result.lines()
    source = str(Path(dataset).parent)
    words = ["/home/me", "hunter2", "X-Amz-Signature", "AKIA", "10.1.2.3", source]
    for path in published.rglob("*"):
        if path.suffix == ".parquet":
            content = f"{pq.read_metadata(path).metadata} {pq.read_table(path).to_pylist()}"
        elif path.is_file():
            content = path.read_text()
        assert not [word for word in words if path.is_file() and word in content], path
    manifest = json.loads((published / MANIFEST).read_text())
    assert manifest["teachers"]["blue"]["model"]["options"]["weights"] == "(local path)"
    assert "moved" not in manifest


def test_only_addresses_that_anybody_can_use_are_public_and_settings_lose_paths_and_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert public_url("HTTP://Example.org:80/a b.jpg#top") == "http://example.org/a%20b.jpg"
    assert public_url(url := "https://example.org/a.jpg?size=3&page=2") == url
    secret = ["https://example.org/a.jpg?token=1", "https://example.org/a.jpg?sig=1"]
    for url in (*secret, "s3://bucket/a.jpg", "http://localhost/a.jpg", "http://[::1]/a.jpg", "http://[oops/a.jpg"):
        assert public_url(url) is None
    assert public_url("https://example.org/" + "a" * 5000) is None
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    Path("models", "own.pt").touch()
    paths = ["~/x", "models/own.pt", "local-dir:/m", "C:\\x"]
    value = {"a": ["ViT-B/32", *paths, "json:caption"], "api_key": "k", "n": 3}
    hidden = ["ViT-B/32", *["(local path)"] * 4, "json:caption"]
    assert without_paths(value) == {"a": hidden, "api_key": "(secret)", "n": 3}


def test_datasets_reads_every_part(published: Path, tmp_path: Path) -> None:
    front = yaml.safe_load((published / "README.md").read_text().split("---\n")[1])
    names = [one["config_name"] for one in front["configs"]]
    assert front["license"] == "cc-by-4.0"
    some = {"samples", "captions--namer", "embeddings--red--images", "identities--uid", "identities--shards"}
    assert some <= {*names}
    for info in front["dataset_info"]:
        name = info["config_name"]
        rows = datasets.load_dataset(str(published), name, split="train", cache_dir=str(tmp_path / "cache"))
        assert len(rows) == info["splits"][0]["num_examples"], name
    assert rows.column_names == ["shard", "size", "rows", "groups"]


def test_a_killed_export_continues_and_a_second_one_writes_nothing(
    dataset: str, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, written = tmp_path / "labels", list[str]()

    def killed(export: labels.LabelsExport, shard: str) -> Any:
        if written:
            raise KeyboardInterrupt
        written.append(shard)
        return labels_export_shard(export, shard)

    labels_export_shard = labels.export_shard
    with monkeypatch.context() as patch:
        patch.setattr(labels, "export_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            export(dataset, output)
    before = stamps(output)
    result = export(dataset, output, licence="cc-by-4.0")
    assert (result.shards, result.kept) == (2, 1)
    now = stamps(output)
    assert all(now[name] == stamp for name, stamp in before.items() if name != MANIFEST)
    assert tree(output) == tree(published)
    before = stamps(output)
    assert export(dataset, output, licence="cc-by-4.0").kept == 2
    assert stamps(output) == before


def test_labels_in_an_object_store_are_those_on_disk(dataset: str, published: Path, s3: Any) -> None:
    export_labels(dataset, "s3://bucket/labels", use_ray=False, licence="cc-by-4.0")
    stored = {name.removeprefix("bucket/labels/"): s3.cat_file(name) for name in s3.find("bucket/labels")}
    assert stored.items() >= tree(published).items()


def test_some_layers_of_a_view_come_with_what_they_are_computed_from(dataset: str, tmp_path: Path) -> None:
    url = str(shutil.copytree(dataset, tmp_path / "dataset"))
    make_view(url, "key LIKE '%1'")
    output = tmp_path / "labels"
    options: dict[str, Any] = {"layers": ["embeddings/red/namer"], "view": "some", "identities": ["uid"]}
    result = export(url, output, **options)
    assert (result.rows, result.shards, dict(result.identities)) == (1, 1, {"uid": 1})
    data = reinforce.open(str(output))
    assert data.layers == ["samples", "captions/namer", "embeddings/red/namer"]
    assert [sample.key for sample in data] == [sample.key for sample in reinforce.open(url, view="some")]
    result = export(url, output, **{**options, "layers": ["embeddings/red"]})  # layers may be added
    assert (result.kept, len(reinforce.open(str(output)).layers)) == (0, 5)
    for changed, message in [({"identities": ["uid", "url"]}, "identities"), ({"view": None}, "view")]:
        with pytest.raises(UserError, match=f"has labels with other {message}"):
            export(url, output, **{**options, "layers": ["embeddings/red"], **changed})
    assert validate(str(output)).findings == []


def test_digests_of_images_by_reference_are_the_stored_ones(config: dict[str, Any], tmp_path: Path) -> None:
    url = reinforce_here({**config, "output": str(tmp_path / "out"), "images": "reference", "teachers": {}})
    assert export(url, tmp_path / "stored").identities["digest"] == 16


def test_bad_input_is_one_line_that_names_the_remedy(
    dataset: str, published: Path, tmp_path: Path, refused: Printed
) -> None:
    for options, message in [
        ({"layers": ["captions/coca"]}, "--layers: .* has no 'captions/coca'; it has: samples, captions/namer"),
        ({"identities": ["name"]}, "--identities: there is no 'name'; there are: uid, sha256, digest, url"),
        ({"view": "none"}, "has no view 'none'"),
    ]:
        with pytest.raises(UserError, match=message):
            export(dataset, tmp_path / "labels", **options)
    with pytest.raises(UserError, match="is in the dataset"):
        export(dataset, Path(dataset) / "labels")
    other = shutil.copytree(dataset, tmp_path / "other")
    with pytest.raises(UserError, match="other has a dataset"):
        export(dataset, other)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(config_of(str(published), tmp_path / "out")))
    err = refused("plan", str(config))
    assert (err.count("\n"), "has labels without images. Name it under `labels`" in err) == (1, True)
