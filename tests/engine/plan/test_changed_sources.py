"""Source files that were replaced under their names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import reinforce
from reinforce.config import parse_config
from reinforce.dataset.files.store import Store
from reinforce.dataset.runs.shard_records import RecordWriter, SourceRecord
from reinforce.engine.messages.results import LayerFailure, ShardResult
from reinforce.engine.plan.changed_sources import changes_note, finished_note, referenced_source_change
from reinforce.engine.plan.plan import make_plan
from reinforce.source.identity import read_state
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.reinforced import reinforce_here

RED = {"red": config_of("", "")["teachers"]["red"]}


def states_of(folder: Path) -> dict[str, SourceRecord]:
    plan = make_plan(parse_config(config_of(f"{folder}/*.tar", folder.parent / "nowhere")))
    return {shard.name: SourceRecord(shard.url, read_state(shard.url)) for shard in plan.pending}


def test_replaced_sources_of_shards_that_get_new_layers_are_named(shards: Callable[..., str], tmp_path: Path) -> None:
    source = shards(2, 2, 2, 2, 2)
    reinforce_here(config_of(source, tmp_path / "out", teachers=RED))
    recorded = states_of(tmp_path / "source")
    config = parse_config(config_of(source, tmp_path / "out"))
    assert changes_note(make_plan(config), recorded) is None
    for number in range(2):
        write_tar(tmp_path / "source" / f"{number:05d}.tar", members_of(number, 40))
    for number in (2, 3):
        path = tmp_path / "source" / f"{number:05d}.tar"
        data = bytearray(path.read_bytes())
        data[700] ^= 1
        path.write_bytes(data)
    os.utime(tmp_path / "source" / "00004.tar", (1, 1))  # touched: the same content
    note = changes_note(make_plan(config), recorded)
    assert note is not None
    assert "4 of 5 shards that get new layers have changed since their samples were written (00000-" in note
    assert " bytes then, " in note
    assert ": its first 64 KiB differ; and 1 more). The new layers are computed from the stored images. Restore" in note
    assert " the old files, or drop the" in note
    fresh = parse_config(config_of(source, tmp_path / "other"))
    assert changes_note(make_plan(fresh), recorded) is None, "samples that are computed now are of the new file"


def test_a_source_that_grew_behind_a_finished_shard_is_said_where_there_is_nothing_to_do(
    shards: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results: list[ShardResult] = []
    config = config_of(shards(2, 2), tmp_path / "out", teachers=RED)
    reinforce_here(config, results=results)
    records = RecordWriter(Store(str(tmp_path / "out")), "a-run")
    for result in results:
        assert result.record is not None
        records.add(result.record)
    records.flush()
    assert "nothing to do" in reinforce.run(config).message
    assert "have changed" not in caplog.text
    write_tar(tmp_path / "source" / "00001.tar", members_of(1, 40))
    assert finished_note(make_plan(parse_config(config)), {}) is None, "its former size is not known"
    assert "nothing to do" in reinforce.run(config).message
    assert "source: 1 of 2 finished shards have changed since their samples were written (00001-" in caplog.text
    assert " bytes then, " in caplog.text


def test_a_source_of_unknown_state_is_not_judged(shards: Callable[..., str], tmp_path: Path) -> None:
    source = shards(2)
    reinforce_here(config_of(source, tmp_path / "out", teachers=RED))
    write_tar(tmp_path / "source" / "00000.tar", members_of(3, 4))
    assert changes_note(make_plan(parse_config(config_of(source, tmp_path / "out"))), {}) is None
    braces = config_of(f"{tmp_path}/source/{{00000..00000}}.tar", tmp_path / "out")
    assert make_plan(parse_config(braces)).listed == {}, "nothing is listed, so nothing is compared"


def test_a_replaced_tar_of_referenced_images_costs_its_shard_instead_of_giving_other_images(
    shards: Callable[..., str], tmp_path: Path
) -> None:
    config: dict[str, Any] = config_of(shards(3), tmp_path / "out", images="reference", teachers=RED)
    reinforce_here(config)
    write_tar(tmp_path / "source" / "00000.tar", members_of(1, 3))
    with pytest.raises(LayerFailure, match=r"images: .*00000\.tar has changed .* its first 64 KiB differ") as caught:
        reinforce_here({**config, "teachers": config_of("", "")["teachers"]})
    assert "referenced images are not where they were" in str(caught.value)
    assert not (tmp_path / "out" / "embeddings" / "blue").exists()


def test_a_longer_tar_of_referenced_images_is_noted(shards: Callable[..., str], tmp_path: Path) -> None:
    config: dict[str, Any] = config_of(shards(40), tmp_path / "out", images="reference", teachers=RED)
    reinforce_here(config)
    write_tar(tmp_path / "source" / "00000.tar", members_of(0, 41))
    [shard] = make_plan(parse_config(config_of(config["source"], tmp_path / "out", images="reference"))).pending
    state = {"source_bytes": "123", "source_head": read_state(shard.url).head or ""}
    note, replaced = referenced_source_change(shard, state)
    assert not replaced
    assert note is not None
    assert "123 bytes then" in note
    assert referenced_source_change(shard, {}) == (None, False)
    reinforce_here({**config, "teachers": config_of("", "")["teachers"]})
    names = json.loads((tmp_path / "out" / "dataset.json").read_text())["teachers"]
    assert [*names] == ["red", "blue"]
