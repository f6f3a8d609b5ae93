"""Files that a lease reads, and those that must fit the samples it writes, are computed again if damaged or stale."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
import pytest

from reinforce.config import parse_config
from reinforce.dataset.index import set_aside
from reinforce.dataset.layer_file import RefusedFile
from reinforce.dataset.store import LayerWriter, Store
from reinforce.dataset.validate import validate
from reinforce.engine.messages import ShardResult
from reinforce.engine.plan.plan import make_plan
from tests.helpers.data import config_of, members_of, tree, write_tar
from tests.helpers.reinforced import reinforce_here, shard_process

LATER = ("embeddings/blue/images", "embeddings/blue/caption", "embeddings/blue/namer")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of the dataset, ``out``, and of its source, with a link to where they were."""
    copy = Path(shutil.copytree(made.parent, tmp_path / "copy"))
    (copy / "made").symlink_to(made.parent)
    return copy


def config(folder: Path) -> dict[str, Any]:
    """The source is moved: the shards keep their names."""
    moved = {str(folder / "source"): f"{(folder / 'made').readlink()}/source"}
    return config_of(f"{folder}/source/*.tar", folder / "out", moved=moved)


def file_of(dataset: Path, layer: str) -> Path:
    return min((dataset / layer).glob("*.parquet"))


def damage(path: Path, group: int) -> None:
    """Invert a byte of the last column of a row group."""
    row_group = pq.read_metadata(path).row_group(group)
    leaf = row_group.column(row_group.num_columns - 1)
    start = leaf.dictionary_page_offset if leaf.has_dictionary_page else leaf.data_page_offset
    content = bytearray(path.read_bytes())
    content[start + leaf.total_compressed_size - 1] ^= 1
    path.write_bytes(content)


def planned_lease(folder: Path) -> Callable[[], ShardResult]:
    """A lease of the first pending shard, any number of times by one plan."""
    planned = shard_process(config(folder))
    return lambda: replace(planned).run()


def lease(folder: Path) -> ShardResult:
    return planned_lease(folder)()


def remove(folder: Path, *layers: str) -> None:
    """Delete the first file of each layer."""
    for layer in layers:
        file_of(folder / "out", layer).unlink()


@pytest.mark.parametrize("layer", ["samples", "captions/namer"])
@pytest.mark.parametrize("group", [0, 1])
def test_a_damaged_file_that_others_are_computed_from_is_set_aside_and_computed_again(
    folder: Path, layer: str, group: int
) -> None:
    before = tree(folder / "out")
    remove(folder, *LATER)
    path = file_of(folder / "out", layer)
    damage(path, group)
    result = lease(folder)
    assert result.set_aside == {layer: "a page does not have its checksum: bytes of it have changed"}
    assert (result.layers, result.files, path.exists()) == ((), {}, False)
    assert len([*(folder / "out" / "set-aside" / layer).iterdir()]) == 1
    reinforce_here(config(folder))
    assert {k: v for k, v in tree(folder / "out").items() if k != "dataset.json"} == {
        k: v for k, v in before.items() if k != "dataset.json"
    }


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_damaged_samples_stay_where_their_source_is_gone_or_another(folder: Path, change: str) -> None:
    shutil.rmtree(folder / "out" / "embeddings" / "blue")
    path = file_of(folder / "out", "samples")
    damage(path, 0)
    before, attempt = path.read_bytes(), planned_lease(folder)
    source = folder / "source" / "00000.tar"
    source.unlink() if change == "removed" else write_tar(source, members_of(7, 9))
    with pytest.raises(RefusedFile, match="It stays, because its source cannot be read or has changed"):
        attempt()
    assert path.read_bytes() == before


def test_a_file_that_vanishes_after_the_plan_or_whose_footer_has_lost_a_column_is_computed_again(folder: Path) -> None:
    remove(folder, *LATER)
    attempt = planned_lease(folder)
    remove(folder, "captions/namer")
    assert attempt().set_aside == {"captions/namer": "it does not exist any more"}
    path = file_of(folder / "out", "samples")
    path.write_bytes(path.read_bytes().replace(b"caption", b"caqtion"))
    assert lease(folder).set_aside == {"samples": "it has no column caption"}


def rewrite_source(folder: Path, keys: int, pictures: int, count: int = 12) -> None:
    """Replace the first tar by one with keys of shard 0 and pictures of another one."""
    pairs = zip(members_of(0, count), members_of(pictures, count), strict=True)
    write_tar(folder / "source" / "00000.tar", [(name, data) for (name, _), (_, data) in pairs][keys:])


@pytest.mark.parametrize("keys", [3, 9], ids=["the same number of other keys", "fewer keys"])
def test_samples_of_a_changed_source_replace_the_other_layers_of_their_shard(folder: Path, keys: int) -> None:
    remove(folder, "samples")
    rewrite_source(folder, keys * 3 if keys == 9 else 9, 0)
    result = lease(folder)
    assert result.layers == ("samples",)
    assert [*result.set_aside] == [*make_plan(parse_config(config(folder))).pending[0].layers]
    reinforce_here(config(folder))
    assert validate(str(folder / "out")).valid
    fresh = reinforce_here({**config(folder), "output": str(folder / "fresh")})
    assert tree(folder / "out").keys() == tree(Path(fresh)).keys()
    for name, content in tree(Path(fresh)).items():
        assert name == "dataset.json" or tree(folder / "out")[name] == content, name


def test_layers_that_a_failed_attempt_has_set_aside_are_still_to_be_computed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove(folder, "samples")
    rewrite_source(folder, 9, 0)
    attempt, stem = planned_lease(folder), file_of(folder / "out", "captions/namer").stem
    with monkeypatch.context() as patch:
        patch.setattr(LayerWriter, "commit", mock.Mock(side_effect=OSError("the storage is away")))
        with pytest.raises(OSError, match="the storage is away"):
            attempt()
    assert not [*(folder / "out" / "embeddings/red/images").glob(f"{stem}*")]
    assert len(attempt().set_aside) == 7


def test_other_images_under_the_same_keys_are_noticed_by_the_source_in_the_files(folder: Path) -> None:
    set_aside(Store(str(folder / "out")), "samples", file_of(folder / "out", "samples").stem)
    rewrite_source(folder, 0, 7, 9)
    result = lease(folder)
    assert len(result.set_aside) == 7
    assert all(reason.startswith("it is of another source file: ") for reason in result.set_aside.values())


def test_samples_that_are_the_same_again_leave_the_other_layers_alone(folder: Path) -> None:
    before = tree(folder / "out")
    set_aside(Store(str(folder / "out")), "samples", file_of(folder / "out", "samples").stem)
    result = lease(folder)
    assert (result.layers, result.set_aside) == (("samples",), {})
    assert tree(folder / "out") == before


def test_layers_of_other_configs_are_compared_too(folder: Path) -> None:
    remove(folder, "samples")
    rewrite_source(folder, 9, 0)
    whole = config(folder)
    reinforce_here({**whole, "captioners": {}, "teachers": {"red": whole["teachers"]["red"]}})
    path = file_of(folder / "out", "samples")
    assert not (folder / "out" / "embeddings/blue/images" / path.name).exists()
    reinforce_here(whole)
    assert validate(str(folder / "out")).valid


def test_stored_captions_that_do_not_fit_new_samples_are_replaced_with_the_rest(folder: Path) -> None:
    remove(folder, "samples", *LATER)
    rewrite_source(folder, 9, 0)
    result = lease(folder)
    assert (result.layers, result.set_aside) == ((), {"captions/namer": "its rows are not those of the samples"})
    result = lease(folder)
    assert len(result.layers) == 1 + 1 + 3
    assert {*result.set_aside} == {f"embeddings/red/{what}" for what in ("images", "caption", "namer")}
    assert lease(folder).layers == tuple(result.set_aside)
    assert validate(str(folder / "out")).valid


def test_stored_captions_of_other_rows_are_set_aside_with_all_layers_that_do_not_fit(folder: Path) -> None:
    """Samples of a changed source were copied next to the other layers."""
    remove(folder, *LATER)
    rewrite_source(folder, 9, 0)
    new = reinforce_here({**config(folder), "output": str(folder / "new")})
    shutil.copy(file_of(Path(new), "samples"), file_of(folder / "out", "samples"))
    result = lease(folder)
    assert {*result.set_aside} == {
        "captions/namer",
        *(f"embeddings/red/{what}" for what in ("images", "caption", "namer")),
    }
    reinforce_here(config(folder))
    assert validate(str(folder / "out")).valid
