"""Source shards that are copies of others, that have moved, or that were replaced under their names."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import reinforce
from reinforce.config import parse_config
from reinforce.dataset.manifest import DIGEST_KEY, update_manifest
from reinforce.dataset.runs import RecordWriter, SourceRecord
from reinforce.dataset.store import MANIFEST, Store
from reinforce.engine.messages import LayerFailure, ShardResult
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.plan.source_changes import changes_note, find_copies, finished_note, referenced_source_change
from reinforce.engine.run import run
from reinforce.errors import UserError
from reinforce.source.references import read_state
from tests.helpers.commands import run_command
from tests.helpers.data import config_of, members_of, tree, write_tar
from tests.helpers.reinforced import reinforce_here

MESSAGE = (
    r"^source: 3 new shards have the file name of another shard, {compared} of them were compared with it, and "
    r"{compared} have the same content, for example {new}/00000\.tar and {old}/00000\.tar\. .* "
    r'set `moved: {{"{new}": "{old}"}}`'
)


@pytest.mark.parametrize("images", ["embed", "reference"])
def test_a_linked_source_is_refused_with_numbers_and_both_urls(
    images: str, shards: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reinforce_here(config_of(shards(3, 2, 4), tmp_path / "out", images=images))
    (tmp_path / "link").symlink_to(tmp_path / "source")
    before = tree(tmp_path / "out")
    config = config_of(f"{tmp_path}/link/*.tar", tmp_path / "out", images=images)
    message = MESSAGE.format(compared=3, new=f"{tmp_path}/link", old=f"{tmp_path}/source")
    with pytest.raises(UserError, match=message):
        run(config)
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    status, _, err = run_command(capsys, "plan", f"{tmp_path}/my.yaml")
    assert (status, "error: source: 3 new shards" in err) == (2, True)
    assert tree(tmp_path / "out") == before


def test_a_source_that_lists_copies_is_refused_and_a_folder_that_is_moved_to_itself_is_not_compared(
    shards: Callable[..., str], tmp_path: Path
) -> None:
    source, copy = shards(3), f"{tmp_path}/copy"
    shutil.copytree(tmp_path / "source", copy)
    with pytest.raises(UserError, match=r"1 have the same content, .* list them once"):
        run(config_of(f"{tmp_path}/{{source,copy}}/*.tar", tmp_path / "out"))
    reinforce_here(config_of(source, tmp_path / "out"))
    config = parse_config(config_of(f"{copy}/*.tar", tmp_path / "out", moved={copy: copy}))
    assert find_copies(make_plan(config), Store(config.output)).new == 0


def test_shards_of_equal_names_and_keys_with_other_content_are_accepted(tmp_path: Path) -> None:
    keys = [name for name, _ in members_of(0, 3)]
    for number, folder in enumerate(("a", "b")):
        content = [data for _, data in members_of(number, 3)]
        write_tar(tmp_path / folder / "00000.tar", list(zip(keys, content, strict=True)))
    output = tmp_path / "out"
    reinforce_here(config_of(f"{tmp_path}/a/*.tar", output))
    config = parse_config(config_of(f"{tmp_path}/{{a,b}}/*.tar", output))
    found = find_copies(make_plan(config), Store(config.output))
    assert (found.pairs, found.compared, found.new) == ([], 1, 1)


def test_a_bounded_number_of_shards_is_compared(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        for number in range(200):
            path = tmp_path / folder / f"{number}.tar"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(f"{folder} {number}".encode())
    config = parse_config(config_of(f"{tmp_path}/{{a,b}}/*.tar", tmp_path / "out"))
    found = find_copies(make_plan(config), Store(config.output))
    assert (found.pairs, found.compared, found.new) == ([], 64, 200)
    (tmp_path / "a" / "0.tar").write_bytes((tmp_path / "b" / "0.tar").read_bytes())
    assert len(find_copies(make_plan(config), Store(config.output)).pairs) == 1


@pytest.mark.parametrize("images", ["embed", "reference"])
def test_a_dataset_whose_source_moved_is_extended_under_the_old_names(
    images: str, shards: Callable[..., str], tmp_path: Path
) -> None:
    teachers = config_of("", "")["teachers"]
    one = {"images": images, "teachers": {"red": teachers["red"]}}
    config = config_of(shards(3, 2), tmp_path / "out", **one)
    reinforce_here(config)
    fresh = tmp_path / "fresh"
    reinforce_here({**config, "output": str(fresh), "teachers": teachers})
    (tmp_path / "source").rename(tmp_path / "new")
    moved = {**config, "source": f"{tmp_path}/new/*.tar", "moved": {f"{tmp_path}/new": f"{tmp_path}/source"}}
    assert make_plan(parse_config(moved)).pending == []
    write_tar(tmp_path / "new" / "00002.tar", members_of(2, 4))
    reinforce_here({**moved, "teachers": teachers})
    write_tar(tmp_path / "source" / "00002.tar", members_of(2, 4))
    reinforce_here({**config, "output": str(fresh), "teachers": teachers, "source": f"{tmp_path}/source/00002.tar"})
    shutil.rmtree(tmp_path / "source")
    found, expected = tree(tmp_path / "out"), tree(fresh)
    found_manifest, expected_manifest = json.loads(found.pop(MANIFEST)), json.loads(expected.pop(MANIFEST))
    assert found == expected, "also for a shard that is new in the new place"
    assert found_manifest.pop(DIGEST_KEY) != expected_manifest.pop(DIGEST_KEY)
    assert found_manifest == {**expected_manifest, "moved": {f"{tmp_path}/new": f"{tmp_path}/source"}}
    samples = [sample.pil().size for sample in reinforce.open(str(tmp_path / "out"), images_from=f"{tmp_path}/new")]
    assert samples == [(40, 30)] * 9, "readers find referenced images where they are now"


def test_the_place_of_a_moved_source_is_recorded_and_replaced(tmp_path: Path) -> None:
    def manifest(old: dict[str, Any] | None, folder: str) -> dict[str, Any]:
        config = parse_config(config_of(f"{folder}/0.tar", tmp_path / "out", moved={folder: "/first"}))
        return update_manifest(old, config, make_plan(config).layers, {})

    second = manifest(None, "/second")
    assert second["moved"] == {"/second": "/first"}
    assert manifest(second, "s3://third")["moved"] == {"s3://third": "/first"}


def test_two_places_of_one_former_folder_are_refused_for_referenced_images() -> None:
    changes = {"moved": {"/b": "/a", "/c": "/a"}}
    parse_config(config_of("x.tar", "out", **changes))
    with pytest.raises(UserError, match="one place only"):
        parse_config(config_of("x.tar", "out", images="reference", **changes))


@pytest.mark.parametrize("source", ["data/{0..1}.tar", "data/*.tar", "list.txt", "{job}/data/0.tar"])
def test_a_source_in_the_folder_of_a_ray_job_is_refused(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    write_tar(job / "data" / "0.tar", members_of(0, 1))
    (job / "list.txt").write_text("data/0.tar\n")
    monkeypatch.chdir(job)
    config = parse_config(config_of(source.replace("{job}", str(job)), tmp_path / "out"))
    make_plan(config)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UserError, match=rf"^source {job}/data/0\.tar is in the temporary folder .* absolute path"):
        make_plan(config)
    make_plan(parse_config(config_of("s3://bucket/{0..1}.tar", tmp_path / "out")))
    make_plan(parse_config(config_of(f"{tmp_path}/{{0..1}}.tar", tmp_path / "out")))


RED = {"red": config_of("", "")["teachers"]["red"]}


def test_replaced_sources_of_shards_that_get_new_layers_are_named(shards: Callable[..., str], tmp_path: Path) -> None:
    source = shards(2, 2, 2, 2, 2)
    reinforce_here(config_of(source, tmp_path / "out", teachers=RED))
    pending = make_plan(parse_config(config_of(f"{tmp_path}/source/*.tar", tmp_path / "nowhere"))).pending
    recorded = {shard.name: SourceRecord(shard.url, read_state(shard.url)) for shard in pending}
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
    assert changes_note(make_plan(config), {}) is None, "of unknown states"
    assert "4 of 5 shards that get new layers have changed since their samples were written (00000-" in note
    assert " bytes then, " in note
    assert ": its first 64 KiB differ; and 1 more). The new layers are computed from the stored images. Restore" in note
    assert " the old files, or drop the" in note
    fresh = parse_config(config_of(source, tmp_path / "other"))
    assert changes_note(make_plan(fresh), recorded) is None, "samples that are computed now are of the new file"
    braces = config_of(f"{tmp_path}/source/{{00000..00000}}.tar", tmp_path / "out")
    assert make_plan(parse_config(braces)).listed == {}, "nothing is listed, so nothing is compared"


def test_a_source_that_grew_behind_a_finished_shard_is_said_where_there_is_nothing_to_do(
    shards: Callable[..., str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results: list[ShardResult] = []
    config = config_of(shards(2, 2), tmp_path / "out", teachers=RED)
    reinforce_here(config, results=results)
    records = RecordWriter(Store(str(tmp_path / "out")), "a-run")
    for result in results:
        records.add(result.record)
    records.flush()
    assert "nothing to do" in reinforce.run(config).message
    assert "have changed" not in caplog.text
    write_tar(tmp_path / "source" / "00001.tar", members_of(1, 40))
    assert finished_note(make_plan(parse_config(config)), {}) is None, "its former size is not known"
    assert "nothing to do" in reinforce.run(config).message
    assert "source: 1 of 2 finished shards have changed since their samples were written (00001-" in caplog.text
    assert " bytes then, " in caplog.text


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
    assert "123 bytes then" in note
    assert referenced_source_change(shard, {}) == (None, False)
    reinforce_here({**config, "teachers": config_of("", "")["teachers"]})
    names = json.loads((tmp_path / "out" / "dataset.json").read_text())["teachers"]
    assert [*names] == ["red", "blue"]
