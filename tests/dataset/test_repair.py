"""``reinforce validate --repair``: what is moved, what stays, and that a run makes the dataset as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from reinforce.dataset.store import Store
from reinforce.dataset.validate import repair, validate
from schemas import Reason
from tests.helpers.commands import printed_by
from tests.helpers.data import config_of, tree
from tests.helpers.reinforced import reinforce_here

RED = "embeddings/red/images"


def repaired(dataset: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    done: dict[str, Any] = json.loads(
        printed_by(capsys, "validate", str(dataset), "--repair", "--json", *options, status=1)
    )["repair"]
    return done


def first(dataset: Path, layer: str) -> Path:
    return sorted((dataset / layer).iterdir())[0]


def cut(path: Path) -> bytes:
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    return content[:-100]


def test_files_at_fault_are_moved_whole_and_the_next_run_restores_the_dataset(
    made: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, path = tree(dataset), first(dataset, RED)
    damaged, findings = cut(path), validate(str(dataset)).findings
    path.write_bytes(before[f"{RED}/{path.name}"])
    done = repair(str(dataset), findings)
    assert (done.moved, done.kept) == ([], [f"{RED}/{path.name} was not moved: it can be read now"])
    cut(path)
    shutil.copy(first(dataset, "embeddings/red/caption"), first(dataset, "embeddings/blue/caption"))
    first(dataset, "captions/namer").unlink()
    report = repaired(dataset, capsys)
    moved = [one["file"] for one in report["moved"]]
    assert moved == [f"{RED}/{path.name}", f"embeddings/blue/caption/{path.name}"]
    assert report["computed"] == {RED: 1, "embeddings/blue/caption": 1, "captions/namer": 1}
    assert (report["kept"], Path(report["moved"][0]["to"]).read_bytes()) == ([], damaged)
    reinforce_here(config_of(f"{made.parent}/source/*.tar", dataset))
    assert tree(dataset) == before
    assert validate(str(dataset)).valid


def test_samples_are_moved_only_where_their_source_is_still_the_same(
    made: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, path = tree(dataset), first(dataset, "samples")
    cut(path)
    [reason] = repaired(dataset, capsys)["kept"]
    assert f"samples/{path.name} was not moved: its source " in reason
    assert "was not looked at, name its folder by --sources, and the samples may be the only copy" in reason
    source = made.parent / "source"
    away = source.rename(made.parent / "away")
    [reason] = repaired(dataset, capsys, "--sources", str(source))["kept"]
    assert "00000.tar cannot be read, and the samples may be the only copy" in reason
    source.mkdir()
    for name in ("00000.tar", "00001.tar"):
        (source / name).write_bytes(b"other")
    [reason] = repaired(dataset, capsys, "--sources", str(source))["kept"]
    assert "00000.tar has changed (" in reason
    shutil.rmtree(source)
    away.rename(source)
    done = repaired(dataset, capsys, "--sources", str(source))
    assert ([moved["file"] for moved in done["moved"]], done["kept"]) == ([f"samples/{path.name}"], [])
    reinforce_here(config_of(f"{source}/*.tar", dataset))
    assert tree(dataset) == before


def test_a_damaged_quarantine_is_found_and_set_aside_with_a_copy_and_the_next_run_restores_the_dataset(
    made: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, store, shard = tree(dataset), Store(str(dataset)), first(dataset, RED).stem
    store.quarantine("samples", shard, [("odd", Reason.IMAGE_BROKEN, "not an image")])
    store.quarantine(RED, shard, [("odd", Reason.NOT_FINITE, "NaN")])
    store.quarantine("samples", "absent-0123456789", [(None, Reason.SHARD_MISSING, "no such file")])
    paths = sorted((dataset / "quarantine").rglob("*.parquet"))
    whole = [path.read_bytes() for path in paths]
    for path, content in zip(paths, whole, strict=True):
        pages = range(20, content.index(b"reason"), 60)
        flipped = [content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :] for place in pages]
        for damaged in (*flipped[:3], b"", content[:-9]):
            path.write_bytes(damaged)
            for quick in (True, False):
                [finding] = validate(str(dataset), quick=quick).findings
                assert (finding.kind, f"{finding.layer}/{finding.shard}") == ("quarantine", _name(path))
        path.write_bytes(content)
    for path in (paths[0], paths[2]):
        cut(path)
    done = repaired(dataset, capsys)
    assert [moved["file"] for moved in done["moved"]] == [
        f"quarantine/{_name(paths[2])}.parquet",
        f"quarantine/{_name(paths[0])}.parquet",
        f"{RED}/{shard}.parquet",
    ]
    assert [Path(moved["to"]).read_bytes() for moved in done["moved"][:2]] == [whole[2][:-100], whole[0][:-100]]
    assert (done["kept"], done["computed"]) == ([], {RED: 1, "samples": 1})
    reinforce_here(config_of(f"{made.parent}/source/*.tar", dataset))
    assert tree(dataset) == {**before, f"quarantine/{_name(paths[1])}.parquet": whole[1]}


def _name(path: Path) -> str:
    """Layer and shard of a quarantine file."""
    return str(path).partition("/quarantine/")[2].removesuffix(".parquet")


def test_nothing_is_moved_where_dataset_json_is_wrong_and_not_the_files(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((dataset / "dataset.json").read_text())
    del manifest["digest"]  # so that nothing covers its other values
    before = tree(dataset, layers_only=False)
    for change, reason in (
        ({"seed": 5}, "nothing was moved, because dataset.json is at fault"),
        ({"layers": {**manifest["layers"], RED: {**manifest["layers"][RED], "dim": 9}}}, "none of its 2 files was"),
    ):
        (dataset / "dataset.json").write_text(json.dumps({**manifest, **change}))
        done = repaired(dataset, capsys)
        assert (done["moved"], len(done["kept"])) == ([], 1)
        assert reason in done["kept"][0]
        assert {name for name in tree(dataset, layers_only=False) if not name.startswith(".tmp/")} == {
            name for name in before if not name.startswith(".tmp/")
        }
