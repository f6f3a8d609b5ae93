"""``reinforce evaluate --fetch``, with a server that answers as the Hub does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from reinforce.evaluation import suite as fetch
from reinforce.evaluation.kinds.base import find_files
from tests.helpers.commands import Command
from tests.helpers.evaluation import colour_samples, find_set, solid_image, stored, write_classification, write_table
from tests.helpers.hub import Hub, serving_hub

OLD, NEW = Hub.sha, "b" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """Serve MNIST and WinoGAViL."""
    root = tmp_path / "hub"
    write_classification(root, "mnist", colour_samples())
    images = [stored(solid_image("red", number)) for number in range(2)]
    columns = {"cue": ["red"], "candidate_images": [images], "candidates": [["a", "b"]], "associations": [["a"]]}
    write_table(root, "winogavil", columns)
    with serving_hub(root) as (handler, endpoint):
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield handler


SETS = ("--sets", "mnist,misc/winogavil")


def fetched(command: Command, suite: str, root: Path, *options: str) -> tuple[int, str, str]:
    return command("evaluate", "--suite", suite, "--data", str(root), "--fetch", *options)


def test_sets_are_downloaded_at_a_revision_and_continued(hub: type[Hub], command: Command, tmp_path: Path) -> None:
    root = tmp_path / "sets"
    status, out, err = fetched(command, "datacomp", root, *SETS, "--dry-run")
    assert (status, root.exists()) == (0, False), err
    assert f"MNIST: 40.1 KiB, 40.1 KiB to download; revision {OLD[:12]}" in out
    hub.refused["winogavil"] = 401
    status, out, err = fetched(command, "datacomp", root, *SETS)
    assert status == 2
    assert "WinoGAViL: " in out
    assert "give them there and set HF_TOKEN" in out
    assert "sets that are not complete: misc/winogavil. The same command continues." in err
    before = hub.asked.copy()
    assert before["test/1.tar"] == 1
    hub.refused.clear()
    hub.sha = NEW
    status, out, err = fetched(command, "datacomp", root, "--sets", "mnist")
    assert status == 2, "the recorded revision is gone"
    assert "Or remove mnist from revisions.json, if the Hub has revision aaaaaaaaaaaa no longer" in out
    hub.sha = OLD
    status, out, err = fetched(command, "datacomp", root, *SETS)
    assert status == 0, err
    assert "MNIST: 40.1 KiB, 0 B to download" in out
    assert hub.asked["test/1.tar"] == 1, "complete files are kept"
    revisions = json.loads((root / "revisions.json").read_text())
    assert revisions["mnist"]["revision"] == OLD
    assert revisions["mnist"]["repository"] == "djghosh/wds_mnist_test"
    for key in ("mnist", "winogavil"):
        assert find_files(find_set(key), str(root)) is not None
    names = [file.relative_to(hub.root) for file in hub.root.rglob("*") if file.is_file()]
    assert all((root / name).read_bytes() == (hub.root / name).read_bytes() for name in names)


def test_a_broken_download_is_finished_by_the_same_command(hub: type[Hub], command: Command, tmp_path: Path) -> None:
    root = tmp_path / "sets"
    hub.cut.add("test/0.tar")
    for _ in range(2):  # newer clients go on by themselves
        status, _, err = fetched(command, "datacomp", root, "--sets", "mnist")
    assert status == 0, err
    tar = Path("wds_mnist_test/test/0.tar")
    assert (root / tar).read_bytes() == (hub.root / tar).read_bytes()
    (root / tar).write_bytes(b"cut off")
    assert fetched(command, "datacomp", root, "--sets", "mnist")[0] == 0
    assert (root / tar).read_bytes() == (hub.root / tar).read_bytes(), "a file of another size is not complete"


def test_a_full_disk_sets_without_a_repository_and_a_broken_record_are_reported(
    hub: type[Hub], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "sets"
    status, out, err = fetched(command, "sugarcrepe", root, "--sets", "sugarcrepe_swap_obj")
    assert status == 2
    assert "it is not on the Hub in its layout; see https://github.com/RAIVNLab/sugar-crepe" in out
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    status, out, err = fetched(command, "datacomp", root, "--sets", "mnist")
    assert status == 2
    assert "40.1 KiB are to be downloaded, and 100 B are free" in err
    monkeypatch.undo()
    (root / "revisions.json").write_text("[")
    status, out, err = fetched(command, "datacomp", root, "--sets", "mnist")
    assert status == 2
    assert "revisions.json cannot be read" in err
    shutil.rmtree(root)
