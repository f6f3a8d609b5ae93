"""Datasets that somebody else has made: opening, inspecting and training from them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import reinforce
from reinforce.errors import UserError
from tests.helpers.reinforced import small_dataset
from tests.hostile.bombs import BOMBS, Bomb
from tests.hostile.words import slug

ROOT = Path(__file__).parents[2]
GIGABYTES = 4  # of address space in which each bomb must be refused
#: Opens the datasets below argv[1] and prints what each raises; argv[2] is the number of gigabytes.
OPEN_ALL = """
import json, resource, sys
from pathlib import Path
import reinforce
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]) * 2**30,) * 2)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        outcome = f"{len(list(reinforce.open(str(folder))))} samples"
    except reinforce.UserError as error:
        outcome = str(error)
    except BaseException as error:
        outcome = f"{type(error).__name__} escaped: {error}"
    print(json.dumps([folder.name, outcome, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]), flush=True)
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A good dataset of one shard."""
    return small_dataset(tmp_path_factory.mktemp("good"), (3,))


@pytest.fixture
def copy(url: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(url, tmp_path / "copy"))


def layer_file(dataset: Path | str, layer: str) -> Path:
    [path] = Path(dataset, layer).glob("*.parquet")
    return path


def footer_of(path: Path) -> dict[str, str]:
    """What the footer of a layer file records, without Arrow's schema."""
    pairs = pq.read_metadata(path).metadata
    return {key.decode(): value.decode() for key, value in pairs.items() if key != b"ARROW:schema"}


@pytest.fixture(scope="module")
def outcomes(url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int]]:
    """The outcome of opening a copy of the dataset with each bomb, and the peak memory in KiB until then."""
    folder = tmp_path_factory.mktemp("bombs")
    for bomb in BOMBS:
        dataset = shutil.copytree(url, folder / slug(bomb.defect))
        path = layer_file(dataset, bomb.layer)
        path.write_bytes(bomb.write(footer_of(path)))
        assert path.stat().st_size < 25 * 2**20
    command = [sys.executable, "-c", OPEN_ALL, str(folder), str(GIGABYTES)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: (outcome, peak) for name, outcome, peak in found}


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: slug(bomb.defect))
def test_bombs(bomb: Bomb, outcomes: dict[str, tuple[str, int]]) -> None:
    outcome, peak = outcomes[slug(bomb.defect)]
    assert bomb.message in outcome
    assert "cannot be read (" in outcome
    assert "escaped" not in outcome
    assert peak < 2**20, "a gigabyte"


def test_an_embedding_dataset_follows_no_reference(copy: Path) -> None:
    path = layer_file(copy, "samples")
    table, footer = pq.read_table(path), footer_of(path)
    reference = pa.array([{"url": "/etc/hostname", "offset": 0, "length": 4}] * 3)
    table = table.drop_columns("image").append_column("image_ref", reference)
    pq.write_table(table.replace_schema_metadata(footer), path)
    with pytest.raises(UserError, match=r"column image, which dataset\.json states, is missing"):
        list(reinforce.open(str(copy), images_from="/etc"))


class Touching(pa.ExtensionType):
    """A type that a library has registered and that runs code from the data, as types of Ray Data have done."""

    ran: ClassVar[list[bytes]] = []

    def __init__(self) -> None:
        super().__init__(pa.string(), "tests.touching")

    def __arrow_ext_serialize__(self) -> bytes:
        return b"code"

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> Touching:
        cls.ran.append(serialized)
        return cls()


def test_types_of_libraries_in_a_schema_are_not_created(copy: Path) -> None:
    path = layer_file(copy, "samples")
    table, footer = pq.read_table(path), footer_of(path)
    pa.register_extension_type(Touching())
    try:
        captions = pa.ExtensionArray.from_storage(Touching(), table["caption"].combine_chunks())
        table = table.set_column(table.column_names.index("caption"), "caption", captions)
        pq.write_table(table.replace_schema_metadata(footer), path)
        Touching.ran.clear()
        assert [sample.caption for sample in reinforce.open(str(copy))] == captions.storage.to_pylist()
        assert len(reinforce.open(str(copy))) == 3
        assert Touching.ran == []
        pq.read_table(path)
        assert Touching.ran, "the file names the type"
    finally:
        pa.unregister_extension_type("tests.touching")
