"""Names of classes that a user's class reads from a file, which says other names when the next run loads it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import reinforce
from reinforce.dataset.drop import drop, plan_drop
from reinforce.dataset.store import MANIFEST, Store
from reinforce.dataset.validate import validate
from reinforce.engine.driver.driver import Driver
from reinforce.errors import UserError
from tests.helpers.data import members_of, tree, write_tar
from tests.helpers.models.classifiers import NAMES
from tests.helpers.reinforced import reinforce_here

FILE = """
from pathlib import Path

import torch
from teachers.protocols import ImageSpec
from tests.helpers.models.classifiers import NAMES, Colors

LABELS = Path(__file__).with_name("labels.txt")


class Listed(Colors):
    version = 1

    def __init__(self, device, **options):
        super().__init__(device, **options)
        self.names = LABELS.read_text().split() if LABELS.exists() else None
        order = [NAMES.index(name) for name in self.names or NAMES if name in NAMES]
        self._colors, self.classes = self._colors[order], len(order)
"""
LAYER = "probabilities/colors"
pytestmark = pytest.mark.usefixtures("worker_in_process")  # many short runs


def config_of(folder: Path, output: Path, shards: str = "*", **classifier: Any) -> dict[str, Any]:
    return {
        "source": f"{folder}/source/{shards}.tar",
        "output": str(output),
        "augmentations": {"count": 2, "size": 16},
        "classifiers": {"colors": {**classifier, "k": 2}},
        "workers": {"batch": 4, "max": 1},
    }


class Listed:
    """A dataset of the first of two shards, by a class whose names and their order are in ``labels.txt``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.labels, self.out = folder, folder / "labels.txt", folder / "out"
        (folder / "listed.py").write_text(FILE)
        for number in range(2):
            write_tar(folder / "source" / f"{number}.tar", members_of(number, 4))
        self.write(NAMES)
        self.run("0")

    def write(self, names: Any) -> None:
        self.labels.write_text("\n".join(names))

    def run(self, shards: str = "*", **options: Any) -> Any:
        return reinforce.run(config_of(self.folder, self.out, shards, **{"class": "listed:Listed"}), **options)

    @property
    def names(self) -> list[str]:
        found: list[str] = json.loads((self.out / MANIFEST).read_text())["layers"][LAYER]["names"]
        return found

    def cells(self) -> list[str]:
        """The name of the most likely class of each crop of each sample."""
        found = [sample.values[LAYER].classes[:, 0] for sample in reinforce.open(str(self.out))]
        return [self.names[number] for classes in found for number in classes]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The cells of both shards, made at once."""
    folder = tmp_path_factory.mktemp("expected")
    for number in range(2):
        write_tar(folder / "source" / f"{number}.tar", members_of(number, 4))
    config = config_of(folder, folder / "out", **{"class": "tests.helpers.models.classifiers:Colors"})
    found = [sample.values[LAYER].classes[:, 0] for sample in reinforce.open(reinforce_here(config))]
    return [NAMES[number] for classes in found for number in classes]


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Listed:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "listed", raising=False)
    return Listed(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (NAMES[::-1], "6 of its 6 classes have other names than before, such as class 0: 'white', before 'red'"),
        ([*NAMES[:4], *NAMES[:3:-1]], "2 of its 6 classes have other names than before, such as class 4: 'white'"),
        (NAMES[:5], "it has 5 classes, before 6"),
        (None, "its classes have no names, before 6, the first 'red'"),
    ],
    ids=["reversed", "two exchanged", "one left out", "the file is gone"],
)
@pytest.mark.parametrize("accepted", [False, True], ids=["", "--accept-changed-classes"])
def test_classes_with_other_names_than_those_of_stored_probabilities_are_an_error(
    listed: Listed, names: Any, message: str, accepted: bool, expected: list[str]
) -> None:
    before = tree(listed.out)
    listed.labels.unlink() if names is None else listed.write(names)
    if accepted:  # of changed code
        (listed.folder / "listed.py").write_text(FILE + "# other code\n")
    with pytest.raises(UserError) as raised:
        listed.run(accept_changed_classes=accepted)
    text = str(raised.value)
    assert text.startswith(f"classifier colors: {message}")
    assert f"reinforce drop {listed.out} {LAYER} --yes" in text
    assert "\n" not in text
    assert tree(listed.out) == before
    listed.write(NAMES)
    listed.run(accept_changed_classes=accepted)
    assert (listed.names, listed.cells()) == ([*NAMES], expected)
    assert validate(str(listed.out)).valid


def test_a_dropped_layer_of_classes_takes_the_names_of_the_next_run(listed: Listed, expected: list[str]) -> None:
    store = Store(str(listed.out))
    drop(store, plan_drop(store, [LAYER]))
    listed.write(NAMES[::-1])
    listed.run()
    assert (listed.names, listed.cells()) == ([*NAMES[::-1]], expected)


def test_a_worker_whose_classes_have_other_names_than_those_of_the_worker_before_ends_the_run(
    listed: Listed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as on another host, or as the replacement of a worker that died."""
    store = Store(str(listed.out))
    drop(store, plan_drop(store, [LAYER]))
    finish_start = Driver.finish_start
    seen: list[Driver] = []

    def start(self: Driver, ref: Any) -> Any:
        info = finish_start(self, ref)
        if info is not None:
            listed.write(NAMES[::-1])
            seen.append(self)
            self.loaded = {("classifiers", "colors"): {"dim": 6, "names": [*NAMES[::-1]]}}
        return info

    monkeypatch.setattr(Driver, "finish_start", start)
    with pytest.raises(UserError, match=r"6 of its 6 classes have other names .* at an earlier worker\. The models of"):
        listed.run()
    assert len(seen) == 1
    assert len(store.shards(LAYER)) == 0
