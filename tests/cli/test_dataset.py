"""``reinforce drop``: a dry run shows what would be deleted; ``--yes`` deletes it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from reinforce.dataset import drop as dropping
from reinforce.dataset.files.store import Store
from tests.helpers.commands import Command
from tests.helpers.data import tree
from tests.helpers.reinforced import small_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return Path(small_dataset(tmp_path, (3, 2)))


def test_a_dry_run_shows_files_and_bytes_and_the_command_that_deletes_also_after_an_interruption(
    dataset: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(dataset, layers_only=False)
    status, out, err = command("drop", str(dataset), "embeddings/red/*")
    *shown, last = out.splitlines()
    assert (status, err) == (0, "")
    size = sum(len(data) for name, data in before.items() if name.startswith("embeddings/red/"))
    assert shown[-2:] == ["dataset.json: the entry teachers.red", f"in total: 6 files ({size / 1024:.1f} KiB)"]
    assert last == f"nothing was deleted; to delete: reinforce drop {dataset} 'embeddings/red/*' --yes"
    assert tree(dataset, layers_only=False) == before

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    delete = shlex.split(last.partition("reinforce ")[2])
    with monkeypatch.context() as patch:
        patch.setattr(dropping, "_remove_entry", interrupt)
        status, _, err = command(*delete)
    assert (status, err) == (130, "stopped; run the same command again to delete the rest\n")
    status, out, _ = command(*delete)
    assert (status, out.splitlines()[-1]) == (0, "deleted")
    assert not any("/red/" in name for name in tree(dataset))


def test_a_dry_run_names_what_depends_on_the_layers_and_the_full_command(dataset: Path, command: Command) -> None:
    for options in ([], ["--yes"]):
        status, out, err = command("drop", str(dataset), "captions/namer", *options)
        assert status == 2
        assert out.splitlines()[-2:] == [
            "depends on this: embeddings/blue/namer",
            "depends on this: embeddings/red/namer",
        ]
        full = f"reinforce drop {dataset} embeddings/blue/namer embeddings/red/namer captions/namer"
        assert err.strip().endswith(f"Name them, too: {full}")
    assert command(*shlex.split(full)[1:], "--yes")[0] == 0
    assert not any("namer" in name for name in tree(dataset))


def test_a_damaged_file_is_shown_and_set_aside_after_a_dry_run(dataset: Path, command: Command) -> None:
    layer = "embeddings/red/images"
    [shard, *_] = sorted(Store(str(dataset)).shards(layer))
    path = dataset / layer / f"{shard}.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    out = command("status", str(dataset))[1]
    fix = f"reinforce drop {dataset} {layer} --shard {shard}"
    assert f"1 file is damaged ({layer}/{shard}.parquet: it is not a Parquet file, or it is cut off)" in out
    assert f"{fix} --yes" in out
    assert "1/2" in next(line for line in out.splitlines() if line.startswith(layer))

    before = tree(dataset, layers_only=False)
    status, out, _ = command(*shlex.split(fix)[1:])
    assert status == 0
    assert out.splitlines() == [str(path), f"nothing was moved; to move to set-aside/: {fix} --yes"]
    assert {k: v for k, v in tree(dataset, layers_only=False).items() if k != ".tmp/lock"} == before
    status, out, _ = command(*shlex.split(fix)[1:], "--yes")
    assert status == 0
    assert not path.exists()
    assert [str(moved) for moved in (dataset / "set-aside" / layer).iterdir()] == [
        out.splitlines()[0].removeprefix("moved to ")
    ]
    assert "damaged" not in command("status", str(dataset))[1]
