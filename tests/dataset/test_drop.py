"""Deleting layers of a dataset, also when it is interrupted, on a disk and in S3."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

import reinforce
from reinforce.config import parse_config
from reinforce.dataset import drop as dropping
from reinforce.dataset.drop import drop, drop_shard, layers_with_shard, plan_drop
from reinforce.dataset.kinds.registry import drop_command
from reinforce.dataset.manifest import read_manifest, record_scales, write_manifest
from reinforce.dataset.store import MANIFEST, Store
from reinforce.engine.plan.plan import make_plan
from reinforce.errors import UserError
from schemas import Reason
from tests.helpers.commands import printed_by
from tests.helpers.data import config_of, members_of, tree, write_tar
from tests.helpers.reinforced import config_for as config
from tests.helpers.reinforced import manifest_to_change, reinforce_here
from tests.helpers.views import make_view

LAYERS = [
    *(f"embeddings/{teacher}/{what}" for teacher in ("blue", "red") for what in ("caption", "images", "namer")),
    *("captions/namer", "samples"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of two shards. A sample has no caption, so it is named in the quarantine of two layers."""
    folder = tmp_path_factory.mktemp("dataset")
    for shard in range(2):
        members = members_of(shard, 3)
        write_tar(folder / "source" / f"{shard:05d}.tar", [m for m in members if m[0] != "00000001.txt"])
    return Path(reinforce_here(config_of(f"{folder}/source/*.tar", folder / "out")))


def drop_layers(url: Path | str, *patterns: str) -> None:
    store = Store(str(url))
    drop(store, plan_drop(store, patterns))


def content(dataset: Path) -> tuple[dict[str, bytes], Any]:
    """The files, and dataset.json as an object: the order of its keys has no meaning."""
    files = tree(dataset)
    return files, json.loads(files.pop(MANIFEST))


def test_views_are_deleted_by_name_and_with_everything(dataset: Path, capfd: pytest.CaptureFixture[str]) -> None:
    url = str(dataset)
    for name in ("best", "other"):
        make_view(url, "captions.namer[1] IS NOT NULL" if name == "best" else "width > 0", name=name)
    before = content(dataset)[0]
    printed = printed_by(capfd, "drop", url, "views/best")
    assert "views/best: 4 files" in printed
    assert f"nothing was deleted; to delete: reinforce drop {url} views/best --yes" in printed
    assert "views/best was made from captions/namer: it stays, and is refused until a run computes the same" in (
        printed_by(capfd, "drop", url, "captions/*", "embeddings/*")
    )
    drop_layers(url, "embeddings/*", "captions/*")
    with pytest.raises(UserError, match="captions/namer was dropped since view best was made"):
        reinforce.open(url, view="best")
    assert len(reinforce.open(url, view="other")) == 6
    drop_layers(url, "views/best")
    assert not (dataset / "views/best").exists()
    with pytest.raises(UserError, match=r"views/other depends on samples\. Name them, too: reinforce drop \S+ '\*'"):
        drop_layers(url, "samples")
    assert {name for name in content(dataset)[0] if "views/other" in name} == {
        name for name in before if "views/other" in name
    }
    drop_layers(url, "*")
    assert not (dataset / "views").exists()
    assert not (dataset / MANIFEST).exists()


def test_a_teacher_is_deleted_with_its_quarantine_and_its_entries(made: Path, dataset: Path) -> None:
    before = content(dataset)
    drop_layers(dataset, "embeddings/red/*")
    files, manifest = content(dataset)
    assert files == {name: data for name, data in before[0].items() if "embeddings/red/" not in name}
    assert {name for name in before[0] if "quarantine/embeddings/red/caption" in name}, "the dataset has a quarantine"
    assert not (dataset / "embeddings" / "red").exists(), "no empty folder is left"
    assert list(manifest["teachers"]) == ["blue"]
    assert manifest == {
        **before[1],
        "digest": manifest["digest"],
        "teachers": {"blue": before[1]["teachers"]["blue"]},
        "layers": {name: entry for name, entry in before[1]["layers"].items() if "/red/" not in name},
    }
    assert len(reinforce.open(str(dataset), strict=True)) == 6
    reinforce_here(config(made, dataset))
    assert content(dataset) == before, "a run computes the same again"

    def models() -> tuple[list[str], list[str]]:
        manifest = read_manifest(Store(str(dataset)))
        return sorted(manifest["teachers"]), sorted(manifest["captioners"])

    drop_layers(dataset, "embeddings/red/images", "embeddings/red/namer")
    assert models() == (["blue", "red"], ["namer"])
    drop_layers(dataset, "embeddings/red/caption")
    assert models() == (["blue"], ["namer"]), "the entry of a model goes with its last layer"
    drop_layers(dataset, "captions/*", "embeddings/*/namer")
    assert models() == (["blue"], [])


def test_samples_are_deleted_only_with_everything(made: Path, dataset: Path) -> None:
    for names in (["samples"], ["samples", *LAYERS[:-2]]):
        with pytest.raises(UserError, match=rf"depends? on .*samples\. Name them, too: reinforce drop {dataset} '\*'"):
            drop_layers(dataset, *names)
    (dataset / "runs" / "2026").mkdir(parents=True)
    (dataset / "runs" / "2026" / "summary.json").write_text("{}")
    drop_layers(dataset, "*")
    assert [name for name in tree(dataset, layers_only=False) if name != ".tmp/lock"] == ["runs/2026/summary.json"]
    reinforce_here(config(made, dataset, seed=1))
    assert read_manifest(Store(str(dataset)))["seed"] == 1


def test_a_plan_has_the_files_and_the_bytes_and_what_is_lost(dataset: Path) -> None:
    store = Store(str(dataset))
    write_manifest(store, record_scales(read_manifest(store), {"red": 63.0}, "tuned"))
    plan = plan_drop(store, ["embeddings/red/*"])
    sizes = {name: [path.stat().st_size for path in dataset.glob(f"{name}/*.parquet")] for name in LAYERS}
    assert [(name, sorted(files)) for name, (files, _) in plan.sizes.items()] == [
        (f"embeddings/red/{what}", sorted(sizes[f"embeddings/red/{what}"])) for what in ("caption", "images", "namer")
    ]
    lines = plan.lines()
    assert lines[0].startswith("embeddings/red/caption: 2 files (")
    assert ", and 1 file (" in lines[0]
    assert lines[0].endswith(" in its quarantine")
    assert "quarantine" not in lines[1]
    assert lines[3] == "dataset.json: the entry teachers.red with the tuned logit scale 63"
    assert lines[4].startswith("in total: 7 files (")
    [images] = only = ["embeddings/a/images"]
    assert drop_command("my data", only, only) == f"reinforce drop 'my data' {images}", "no pattern for one layer"


def test_an_unknown_layer_and_a_folder_without_a_dataset_are_errors(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no layer embeddings/rde/\*; it has: embeddings/blue/caption, .*samples"):
        plan_drop(Store(str(dataset)), ["embeddings/red/*", "embeddings/rde/*"])
    for name in ("runs", "quarantine/samples", "../out/samples", "embeddings/red", ""):
        with pytest.raises(UserError, match="has no layer"):
            plan_drop(Store(str(dataset)), [name])
    with pytest.raises(UserError, match="is not a reinforced dataset"):
        plan_drop(Store(str(tmp_path / "none")), ["*"])
    assert not (tmp_path / "none").exists()


def test_layers_that_the_manifest_does_not_list_are_deleted_too(dataset: Path) -> None:
    manifest = manifest_to_change(dataset)
    del manifest["layers"]["embeddings/red/images"]
    (dataset / MANIFEST).write_text(json.dumps(manifest))
    Store(str(dataset)).quarantine("embeddings/green/images", "s", [(None, Reason.SHARD_FAILED, "")])
    (dataset / "embeddings" / "empty" / "images").mkdir(parents=True)
    drop_layers(dataset, "embeddings/red/images", "embeddings/green/*")
    assert not list(dataset.rglob("embeddings/red/images")) + list(dataset.rglob("green"))
    with pytest.raises(UserError, match="has no layer"):
        plan_drop(Store(str(dataset)), ["embeddings/empty/*"])
    (dataset / MANIFEST).unlink()
    drop_layers(dataset, "*")
    assert [name for name in tree(dataset, layers_only=False) if name != ".tmp/lock"] == []


def test_a_dataset_that_a_run_writes_is_not_changed_and_other_files_in_a_layer_stay(dataset: Path) -> None:
    (dataset / "embeddings" / "red" / "images" / "notes.txt").write_text("mine")
    store, before = Store(str(dataset)), tree(dataset)
    plan = plan_drop(store, ["embeddings/red/*"])
    with Store(str(dataset)).lock(), pytest.raises(UserError, match="another run is writing"):
        drop(store, plan)
    assert tree(dataset) == before
    drop(store, plan)
    assert [path.name for path in (dataset / "embeddings" / "red").rglob("*.*")] == ["notes.txt"]


def interrupted_drop(dataset: Path, pattern: str, step: int) -> None:
    """Raise KeyboardInterrupt before the deletion or the writing of the file with this number."""
    steps = iter(range(1000))

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if next(steps) >= step:
                raise KeyboardInterrupt
            return function(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dropping, "_DELETED_AT_ONCE", 1)
        patch.setattr(LocalFileSystem, "rm_file", counted(LocalFileSystem.rm_file))
        patch.setattr(Store, "write_json", counted(Store.write_json))
        with pytest.raises(KeyboardInterrupt):
            drop_layers(dataset, pattern)


@pytest.fixture(scope="module")
def other(made: Path) -> tuple[dict[str, Any], tuple[dict[str, bytes], Any]]:
    """Teachers of another config, and the content of a dataset that was made with it."""
    teachers = config_of("", "")["teachers"]
    teachers["red"] = {**teachers["red"], "codec": "int8"}
    return teachers, content(Path(reinforce_here(config(made, made.parent / "other", teachers=teachers))))


@pytest.mark.parametrize(
    ("pattern", "step"),
    [*(("embeddings/red/*", step) for step in range(10)), *(("*", step) for step in range(0, 20, 3))],
)
def test_after_an_interrupted_drop_a_run_computes_what_was_deleted_and_another_config_is_refused_until_it_is_finished(
    made: Path, dataset: Path, other: tuple[dict[str, Any], Any], pattern: str, step: int
) -> None:
    before = content(dataset)
    interrupted_drop(dataset, pattern, step)
    with pytest.raises(UserError, match="seed: 0 in the dataset, 5 in this config"):
        make_plan(parse_config(config(made, dataset, seed=5)))
    if pattern != "*":
        teachers, expected = other
        with pytest.raises(UserError, match=r'dtype: "float16" in the dataset, "int8" in this config') as caught:
            make_plan(parse_config(config(made, dataset, teachers=teachers)))
        _, _, arguments = str(caught.value).rpartition(f"reinforce drop {dataset} ")
        finished = shutil.copytree(dataset, dataset.parent / "finished")
        drop_layers(finished, *(argument.strip("'") for argument in arguments.split()))
        reinforce_here(config(made, finished, teachers=teachers))
        assert content(finished) == expected, "as if the other config had been there from the start"
    reinforce_here(config(made, dataset))
    assert content(dataset) == before


def test_layers_and_damaged_files_in_s3_are_removed_and_computed_again(s3: Any, made: Path) -> None:
    url = "s3://bucket/out"
    reinforce_here(config(made, url))
    before = {path: s3.cat_file(path) for path in s3.find("bucket/out")}
    drop_layers(url, "embeddings/red/*")
    of_red = ("embeddings/red/", "index/embeddings--red--")
    assert {path for path in before if not any(part in path for part in of_red)} == {*s3.find("bucket/out")}
    assert list(read_manifest(Store(url))["teachers"]) == ["blue"]
    reinforce_here(config(made, url))
    after = {path: s3.cat_file(path) for path in s3.find("bucket/out")}
    assert json.loads(after.pop(f"bucket/out/{MANIFEST}")) == json.loads(before.pop(f"bucket/out/{MANIFEST}"))
    assert after == before

    store, layer = Store(url), "embeddings/red/images"
    shard = min(store.shards(layer))
    path = store.layer_path(layer, shard)
    s3.pipe_file(path, before[path][:-9])
    assert [(one.layer, one.shard) for one in make_plan(parse_config(config(made, url))).damaged] == [(layer, shard)]
    reinforce_here(config(made, url))
    s3.invalidate_cache()
    assert s3.cat_file(path) == before[path]
    [moved] = s3.find(store.path("set-aside"))
    assert s3.cat_file(moved) == before[path][:-9]
    s3.rm(moved)
    drop_layers(url, "*")
    assert s3.find("bucket/out") == []


def test_a_file_of_a_shard_is_set_aside_and_computed_again(made: Path, dataset: Path) -> None:
    store, before = Store(str(dataset)), content(dataset)
    layer = "embeddings/red/caption"
    shard = min(store.shards(layer))
    layers = layers_with_shard(store, [layer], shard)
    assert (layers, content(dataset)) == ([layer], before), "nothing is moved yet"
    [moved] = drop_shard(store, layers, shard)
    assert Path(moved).read_bytes() == before[0].pop(f"{layer}/{shard}.parquet")
    assert Path(moved).parent == dataset / "set-aside" / layer
    assert content(dataset)[0] == {k: v for k, v in before[0].items() if k != f"quarantine/{layer}/{shard}.parquet"}
    assert len(reinforce.open(str(dataset))) == 3
    reinforce_here(config(made, dataset))
    assert content(dataset) == content(made), "a run computes the same again"
    with pytest.raises(UserError, match=r"has no file embeddings/red/caption/zero\.parquet"):
        layers_with_shard(store, [layer], "zero")


@pytest.mark.parametrize("linked", ["captions/namer", "embeddings", "quarantine/captions"])
def test_the_files_behind_a_link_are_not_deleted(dataset: Path, tmp_path: Path, linked: str) -> None:
    (dataset / "quarantine" / "captions" / "namer").mkdir(parents=True, exist_ok=True)
    elsewhere = tmp_path / "elsewhere"
    (dataset / linked).rename(elsewhere)
    (dataset / linked).symlink_to(elsewhere)
    before = tree(dataset), tree(elsewhere)
    with pytest.raises(UserError, match=f"{linked} is a link to {elsewhere}.*Nothing was deleted. Remove the link"):
        drop_layers(dataset, "captions/namer", "embeddings/*")
    assert (tree(dataset), tree(elsewhere)) == before
    (dataset / linked).unlink()
    drop_layers(dataset, "captions/namer", "embeddings/*")
    assert tree(elsewhere) == before[1]
