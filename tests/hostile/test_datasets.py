"""Datasets that somebody else has made: opening, inspecting and training from them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import reinforce
import schemas
from reinforce.dataset.status import read_status
from reinforce.errors import UserError
from tests.helpers.commands import run_command
from tests.helpers.images import raw_png
from tests.helpers.reinforced import manifest_to_change, small_dataset
from tests.hostile.bombs import BOMBS, FORGED, Bomb
from tests.hostile.table import slug
from tests.student.data.test_reader import feed_of, read_epoch

ROOT = Path(__file__).parents[2]
ROWS = 8
GIGABYTES = 4  # of address space in which each bomb must be refused
#: Opens the datasets below argv[1] and prints what each raises; argv[2] is the number of gigabytes.
OPEN_ALL = """
import json, re, resource, sys
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
    # getrusage would count what the test process had when it started this one.
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
    print(json.dumps([folder.name, outcome, peak]), flush=True)
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A good dataset of one shard."""
    return small_dataset(tmp_path_factory.mktemp("good"), (ROWS,))


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


def rewrite(dataset: Path, name: str, column: Any, instead_of: str = "") -> None:
    """Replace a column of the samples, also by one of another name and type."""
    path = layer_file(dataset, "samples")
    table, footer = pq.read_table(path), footer_of(path)
    table = table.set_column(table.column_names.index(instead_of or name), name, column)
    pq.write_table(table.replace_schema_metadata(footer), path)


@pytest.fixture(scope="module")
def outcomes(url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int]]:
    """The outcome of opening a copy of the dataset with each bomb, and the peak memory in KiB until then."""
    folder = tmp_path_factory.mktemp("bombs")
    for bomb in BOMBS:
        dataset = shutil.copytree(url, folder / slug(bomb.defect))
        shutil.rmtree(Path(dataset, "index"))  # its sizes would show that the file is another one
        path = layer_file(dataset, bomb.layer)
        path.write_bytes(bomb.write(footer_of(path)))
        assert path.stat().st_size < 25 * 2**20
    command = [sys.executable, "-c", OPEN_ALL, str(folder), str(GIGABYTES)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1080, check=False)
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
    reference = pa.array([{"url": "/etc/hostname", "offset": 0, "length": 4}] * ROWS)
    rewrite(copy, "image_ref", reference, instead_of="image")
    path = layer_file(copy, "samples")
    footer, digests = footer_of(path), pa.array([0] * ROWS, pa.uint64())
    table = pq.read_table(path).append_column(schemas.IMAGE_DIGEST, digests)
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
    pa.register_extension_type(Touching())
    try:
        captions = pa.ExtensionArray.from_storage(Touching(), pq.read_table(path)["caption"].combine_chunks())
        rewrite(copy, "caption", captions)
        Touching.ran.clear()
        assert [sample.caption for sample in reinforce.open(str(copy))] == captions.storage.to_pylist()
        assert len(reinforce.open(str(copy))) == ROWS
        assert Touching.ran == []
        pq.read_table(path)
        assert Touching.ran, "the file names the type"
    finally:
        pa.unregister_extension_type("tests.touching")


def forge(dataset: Path, **changes: Any) -> None:
    """Change values of dataset.json, by their keys with ``__`` for the levels."""
    manifest = manifest_to_change(dataset)
    for key, value in changes.items():
        *folders, last = key.split("__")
        part = manifest
        for folder in folders:
            part = part[folder]
        part[last] = value
    (dataset / "dataset.json").write_text(json.dumps(manifest))


def read_every_way(dataset: Path) -> None:
    """Open, inspect and iterate a dataset, and read it as a training does."""
    url = str(dataset)
    read_status(url)
    for sample in reinforce.open(url):
        sample.augmented(0)
    read_epoch(feed_of(dataset))


@pytest.mark.parametrize(("changes", "message"), FORGED.values(), ids=map(slug, FORGED))
def test_forged_manifests(copy: Path, changes: dict[str, Any], message: str) -> None:
    forge(copy, **changes)
    with pytest.raises(UserError, match=message) as raised:
        read_every_way(copy)
    assert "\x1b" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"layers": ' + b"[" * 100_000, "is not valid JSON"),
        (b'{"seed": ' + b"1" * 10_000 + b"}", "is not valid JSON"),
        (b" " * (17 * 2**20), "has more than 16,777,216 bytes"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[]", "is not a JSON object"),
    ],
    ids=["nested", "nested object", "number", "long", "bytes", "list"],
)
def test_a_manifest_that_is_no_manifest(copy: Path, content: bytes, message: str) -> None:
    (copy / "dataset.json").write_bytes(content)
    for read in (reinforce.open, read_status):
        with pytest.raises(UserError, match=message):
            read(str(copy))


def test_pipes_and_devices_in_place_of_files_do_not_block(copy: Path) -> None:
    samples = layer_file(copy, "samples")
    samples.unlink()
    samples.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"no shard that is complete|not a regular file"):
        list(reinforce.open(str(copy)))
    (copy / "dataset.json").unlink()
    os.mkfifo(copy / "dataset.json")
    with pytest.raises(UserError, match="is not a file"):
        reinforce.open(str(copy))


def test_limits_are_those_of_the_reader(copy: Path) -> None:
    """An image of 20,000 x 20,000 pixels, which would take 1.2 GB, in a file of 1.2 MB."""
    side = 20_000
    image = raw_png(side, side, 1, 0, bytes((side // 8 + 1) * side))
    rewrite(copy, "image", pa.array([image] * ROWS, pa.binary()))
    forge(copy, input__limits__pixels=10**13)
    with pytest.raises(UserError, match=r"20000x20000 pixels.* It is not decoded"):
        next(iter(reinforce.open(str(copy)))).pil()
    with pytest.raises(UserError, match="20000x20000 pixels"):
        read_epoch(feed_of(copy))


def test_a_terminal_is_not_controlled_by_a_status(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    escapes = "\x1b]0;title\x07\x9b2J\u202e"
    summary = {"run": escapes, "shards": 1, "seconds": 1.0, "message": escapes, "cleaned": {escapes: {"dropped": 1}}}
    (copy / "runs" / "r").mkdir(parents=True)
    (copy / "runs" / "r" / "summary.json").write_text(json.dumps(summary))
    shutil.copy(layer_file(copy, "samples"), copy / "samples" / f"{escapes.replace('/', '')}.parquet")
    status, *printed = run_command(capsys, "status", str(copy))
    assert status == 0
    shown = "".join(printed)
    assert not set(escapes) & set(shown) - set("]0;title2J")
    assert "last run" in shown
    for wrong in ({"shards": "many"}, {"seconds": [1]}, {"cleaned": 3}, {"run": {}}):
        (copy / "runs" / "r" / "summary.json").write_text(json.dumps({**summary, **wrong}))
        with pytest.raises(UserError, match=r"summary\.json is not valid"):
            read_status(str(copy))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *[
            ({"ops": [{"name": name, "magnitude": magnitude}]}, "augmentation record")
            for name, magnitude in (("Posterize", -3e38), ("Posterize", float("nan")), ("Rotate", float("inf")))
        ],
        ({"ops": [{"name": "ShearX", "magnitude": 1e30}]}, "augmentation record"),
        ({"ops": [{"name": "Sudo", "magnitude": 1.0}]}, "augmentation record"),
        ({"size": 2**31 - 1}, "a record of 2147483647 pixels"),
    ],
    ids=str,
)
def test_operations_that_no_run_samples_are_refused(copy: Path, values: dict[str, Any], message: str) -> None:
    column = pq.read_table(layer_file(copy, "samples"))["augmentations"]
    records = [[{**record, **values} for record in row] for row in column.to_pylist()]
    rewrite(copy, "augmentations", pa.array(records, column.type))
    with pytest.raises(UserError, match=message):
        read_every_way(copy)
