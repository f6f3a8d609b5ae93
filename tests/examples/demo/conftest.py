"""The demo's shards and small npm packages, written once for all tests of the demo."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from filelock import FileLock

from examples.demo import data, teacher_data
from examples.demo.data import shared_concepts, write_noisy_shards, write_shards, write_tests
from examples.demo.names import Concept
from tests.helpers.data import write_tar


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's `shards`, `noisy-shards` and `tests`, written once for all processes: drawing takes seconds."""
    parallel = "PYTEST_XDIST_WORKER" in os.environ
    folder = (tmp_path_factory.getbasetemp().parent if parallel else tmp_path_factory.getbasetemp()) / "demo-data"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            write_noisy_shards(f"{folder}.new/noisy-shards", write_shards(f"{folder}.new/shards"))
            write_tests(f"{folder}.new/tests")
            os.rename(f"{folder}.new", folder)
    return folder


@pytest.fixture(scope="session")
def shards(demo_folder: Path) -> list[Path]:
    """The student's training shards."""
    return sorted((demo_folder / "shards").glob("*.tar"))


@pytest.fixture(scope="session")
def tests(demo_folder: Path) -> Path:
    """The folder of the test sets."""
    return demo_folder / "tests"


@pytest.fixture
def few_concepts(monkeypatch: pytest.MonkeyPatch) -> Sequence[Concept]:
    """A twentieth of the concepts, with those of the npm packages, instead of all: drawing these takes seconds."""
    concepts = data.shared_concepts()
    unseen = next(concept for concept in concepts if concept.unseen)
    few = [c for n, c in enumerate(concepts) if n % 20 == 0 or c is unseen or c.emoji.key == "1f34e"]
    for module in (data, teacher_data):
        monkeypatch.setattr(module, "shared_concepts", lambda: few)
    return few


def pack(folder: Path, package: str, members: dict[str, object]) -> None:
    """Write an archive as `npm pack` does."""
    packed = [(f"package/{path}", json.dumps(content).encode()) for path, content in members.items()]
    name, _, version = package.lstrip("@").rpartition("@")
    write_tar(folder / f"{name.replace('/', '-')}-{version}.tgz", packed)


@pytest.fixture(scope="session")
def npm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The npm packages, with two emoji in each set: an apple and one of the unseen concepts."""
    folder = tmp_path_factory.mktemp("npm")
    unseen = next(concept for concept in shared_concepts() if concept.unseen)
    square = '<path fill="{}" d="M2 2h12v12H2z"/>'
    for style, icons in teacher_data.ICON_SETS.items():
        apple = "redapple" if style == "fxemoji" else "red-apple"
        bodies = {apple: {"body": square.format("red")}, "unseen": {"body": square.format("blue")}}
        spelled = {"1f34e": "red-apple", unseen.emoji.key: "unseen", "1f44b-1f3fd": "red-apple"}
        members: dict[str, object] = {"icons.json": {"icons": bodies, "width": 16, "height": 16}}
        members["chars.json"] = spelled if style in ("noto", "fluent") else {}
        pack(folder, icons.package, members)
    entry = {"hexcode": "1F34E", "label": "red apple", "tags": ["fruit", "ripe"]}
    pack(folder, "emojibase-data@17.0.0", {"en/data.json": [entry]})
    return folder
