"""Planning: missing layers, the scale of DFN-5B, and errors that stop it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from reinforce.config import parse_config
from reinforce.dataset.store import Store
from reinforce.engine.plan.plan import NotInSource, make_plan
from reinforce.engine.plan.source_shards import source_shards
from reinforce.errors import UserError
from schemas import Reason
from tests.helpers.commands import output_of
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.published import config_of as published_config
from tests.helpers.reinforced import reinforce_here


def test_planning_a_hundred_thousand_shards_is_quick_and_lean(tmp_path: Path) -> None:
    write_tar(tmp_path / "000000.tar", members_of(0, 3))
    server = "{family: openai, url: 'http://127.0.0.1:1', model: tiny, prompt: Describe.}"
    code = f"""
import re, sys, time
start = time.process_time()
from reinforce.cli import main
try:
    main(["plan", "configs/dfn5b.yaml", "--set", "source={tmp_path}/{{000000..099999}}.tar",
          "--set", "output={tmp_path}/out", "--set", "captioners.vlm={server}"])
except SystemExit as end:
    assert not end.code, end.code
print("seconds", time.process_time() - start)
print("imported", sorted({{"openai", "ray", "torch"}} & sys.modules.keys()))
status = open("/proc/self/status").read()  # getrusage would count the process that forked this one
print("megabytes", int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 1024)
"""
    printed = output_of(sys.executable, "-c", code)
    figures = dict(line.split() for line in printed.splitlines() if line.startswith(("seconds", "megabytes")))
    assert "100,000 shards" in printed
    assert "imported []" in printed, "planning needs none of them"
    assert float(figures["seconds"]) < 10
    assert float(figures["megabytes"]) < 500


def test_the_same_shard_twice_and_references_into_compressed_tars_are_refused(
    shards: Callable[..., str], tmp_path: Path
) -> None:
    shards(1)
    url = f"{tmp_path}/source/00000.tar"
    with pytest.raises(UserError, match="same shard name"):
        source_shards(parse_config(config_of([url, f"{tmp_path}/source/../source/00000.tar"], "out")))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="uncompressed"):
        source_shards(parse_config(config_of("x/{0..1}.tar.gz", "out", images="reference")))


def test_a_shard_quarantined_in_a_layer_is_not_planned_there_nor_in_layers_that_need_it(
    shards: Callable[..., str], tmp_path: Path
) -> None:
    config = parse_config(config_of(shards(2, 2), tmp_path / "out"))
    plan = make_plan(config)
    store = Store(config.output)
    first, second = (shard.name for shard in plan.pending)
    store.quarantine("captions/namer", first, [(None, Reason.SHARD_FAILED, "raised")])
    store.quarantine("captions/namer", second, [("a key", Reason.IMAGE_BROKEN, "a row only: killed before its commit")])
    again = {shard.name: shard.layers for shard in make_plan(config).pending}
    assert not any("namer" in layer for layer in again[first])
    assert "embeddings/red/caption" in again[first]
    assert again[second] == tuple(plan.layers)
    assert make_plan(config, retry_quarantined=True).pending == plan.pending


def test_shards_of_the_dataset_that_are_not_in_the_source_are_counted(
    shards: Callable[..., str], tmp_path: Path
) -> None:
    everything = config_of(shards(2, 2, 2), tmp_path / "out", captioners={})
    reinforce_here({**everything, "source": f"{tmp_path}/source/0000[01].tar"})
    plan = make_plan(parse_config(everything))
    assert plan.not_in_source == NotInSource()
    store = Store(str(tmp_path / "out"))
    [third] = plan.pending
    store.quarantine("samples", third.name, [(None, Reason.SHARD_UNREADABLE, "not a tar")])
    store.quarantine("embeddings/red/images", third.name, [(None, Reason.SHARD_FAILED, "raised")])
    first, second = sorted(store.shards("samples"))
    less = parse_config({**everything, "source": f"{tmp_path}/source/00001.tar"})
    expected = NotInSource(1, 1, first, f"samples/{third.name}")
    assert make_plan(less).not_in_source == make_plan(less, retry_quarantined=True).not_in_source == expected
    assert make_plan(less).states["samples"].quarantined == 0
    assert second not in str(expected)


def test_published_shards_are_paired_by_name_else_by_order(tmp_path: Path) -> None:
    def paired(*reinforcements: str) -> list[str]:
        urls = [f"dr/{name}.tar" for name in reinforcements]
        source = [f"source/{name}.tar.gz" for name in ("1/a", "1/b", "2/a")]
        pending = make_plan(parse_config(published_config(tmp_path, source=source, reinforcements=urls))).pending
        assert [one.url for one in pending] == source
        return [str(one.reinforcements).removeprefix("dr/").removesuffix(".tar") for one in pending]

    assert paired("2/a", "1/b", "1/a", "1/c") == ["1/a", "1/b", "2/a"]
    assert paired("x", "y", "z") == ["x", "y", "z"]
    with pytest.raises(UserError, match=r"2 shards for the 3 of `source`, and not all of these .* Name as many"):
        paired("1/a", "1/b")


def test_a_damaged_file_of_a_layer_that_dataset_json_does_not_list_is_named(
    shards: Callable[..., str], tmp_path: Path
) -> None:
    """A run was killed before it wrote dataset.json, and the machine lost what was not on the disk."""
    config = config_of(shards(2), tmp_path / "out", captioners={}, teachers={})
    reinforce_here(config)
    (tmp_path / "out" / "dataset.json").unlink()
    [path] = (tmp_path / "out" / "samples").iterdir()
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match=rf"{path} cannot be read .* reinforce drop {tmp_path}/out samples --shard "):
        make_plan(parse_config(config))
