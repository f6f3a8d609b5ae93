"""A dataset that would lie in, above or at what its run reads is refused before anything is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from reinforce.config import load_config, parse_config
from reinforce.engine.plan.source_shards import overlaps
from reinforce.engine.run import run
from reinforce.errors import UserError
from tests.helpers.data import config_of, picture, write_tar
from tests.helpers.reinforced import reinforce_here

ROOT = Path(__file__).parents[3]
INSIDE, CONTAINS, SAME = "is inside", "contains", "is the same as"
FILES, AMONG = "contains the files of", "is among the files of"
OVERLAPPING = [
    ("photos", "photos", SAME),
    ("photos/", "./photos", SAME),
    ("photos", "photos/out", INSIDE),
    ("photos", "photos/a/b/../out", INSIDE),
    ("photos", "file://{cwd}/photos/out", INSIDE),
    ("file://{cwd}/photos", "photos", SAME),
    ("local://{cwd}/photos", "{cwd}/photos", SAME),
    ("link", "photos/out", INSIDE),
    ("photos", "link/out", INSIDE),
    ("photos", "link", SAME),
    ("photos/a", "photos", CONTAINS),
    ("photos/a/x.tar", "photos", CONTAINS),
    ("photos/x.tar", "photos", CONTAINS),
    ("photos/x.tar", "photos/x.tar", SAME),
    ("photos/*.tar", "photos", FILES),
    ("link/*.tar", "photos", FILES),
    ("photos/{00..11}/*.tar", "photos", FILES),
    ("photos/{00..11}/*.tar", "photos/07", FILES),
    ("photos/{a,b}", "photos/b/out", INSIDE),
    ("photos/**/*.parquet", "photos/out", AMONG),
    ("photos/*/*/*.parquet", "photos/out", AMONG),
    ("p*/{a,out}/*/*.parquet", "photos/out", AMONG),
    ("list.txt", "photos", CONTAINS),
    (["other/x.tar", "photos"], "photos/out", INSIDE),
    ("s3://bucket/photos", "s3://bucket/photos/", SAME),
    ("s3a://key:secret@bucket/photos", "s3://bucket/photos/out", INSIDE),
    ("s3://bucket/photos/{000..999}.tar", "s3://bucket/photos", CONTAINS),
    ("s3://bucket/photos/*.tar", "s3://bucket", FILES),
    ("s3://{bucket,other}/photos/x.tar", "s3://other", CONTAINS),
    ("simplecache::s3://bucket/photos", "s3://bucket/photos/out", INSIDE),
    ("zip://*.png::{cwd}/photos/x.zip", "photos", CONTAINS),
    ("memory://photos", "memory:///photos/out", INSIDE),
]
APART = [
    ("photos", "out"),
    ("photos", "photos-out"),
    ("photos", "s3://bucket/photos"),
    ("photos/*.tar", "photos/out"),
    ("photos/*/*.tar", "photos/out"),
    ("photos/a*/**/*.tar", "photos/out"),
    ("photos/{00..11}/*.tar", "photos/12"),
    ("photos/[ab]", "photos/out"),
    ("list.txt", "photos/out"),
    ("s3://bucket/photos", "s3://bucket/photos2"),
    ("s3://bucket/photos", "s3://other/photos/out"),
    ("s3://bucket/{000000..190735}.tar", "s3://bucket/out"),
    ("https://example.org/photos/*.tar?sig=1", "photos"),
]


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "photos/a").mkdir(parents=True)
    (tmp_path / "link").symlink_to("photos")
    (tmp_path / "list.txt").write_text("# a list\nother/x.tar\nphotos/a/0.tar\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(source: Any, output: str, cwd: Path, **more: Any) -> list[tuple[str, str]]:
    named = [one.replace("{cwd}", str(cwd)) for one in ([source] if isinstance(source, str) else source)]
    return [*overlaps(parse_config({"source": named, "output": output.replace("{cwd}", str(cwd)), **more}))]


@pytest.mark.parametrize(("source", "output", "relation"), OVERLAPPING)
def test_an_output_at_in_or_above_its_source_is_found(cwd: Path, source: Any, output: str, relation: str) -> None:
    [(is_, read)] = found(source, output, cwd)
    assert (is_, read.partition(" ")[0]) == (relation, "source")
    assert "secret" not in read


@pytest.mark.parametrize(("source", "output"), APART)
def test_an_output_apart_from_its_source_is_not(cwd: Path, source: str, output: str) -> None:
    assert not found(source, output, cwd)


@pytest.mark.parametrize(
    ("key", "more"),
    [
        ("reinforcements", {"reinforcements": ["x/*.tar", "labels/*.tar"]}),
        ("labels.theirs.url", {"labels": {"theirs": {"url": "labels", "layers": ["captions/x"]}}}),
    ],
)
def test_other_keys_that_name_what_is_read_are_checked(cwd: Path, key: str, more: dict[str, Any]) -> None:
    assert [read.partition(" ")[0] for _, read in found("photos", "labels", cwd, **more)] == [key]
    assert not found("photos", "other", cwd, **more)


def test_a_folder_at_the_end_of_a_long_list_is_found(cwd: Path) -> None:
    lines = [f"s3://bucket/{number % 100}/{number}.tar" for number in range(5_000)]
    (cwd / "many.txt").write_text("\n".join([*lines, "s3://bucket/photos"]))
    assert found("many.txt", "s3://bucket/photos/out", cwd) == [(INSIDE, f"source {cwd}/many.txt")]
    assert not found("many.txt", "s3://bucket/out", cwd)
    assert found("many.txt", "s3://bucket/99", cwd) == [(CONTAINS, f"source {cwd}/many.txt")]


def test_a_run_refuses_before_it_writes_also_where_there_is_a_dataset(cwd: Path) -> None:
    (cwd / "photos/x.png").write_bytes(picture(1))
    values = config_of("photos", "photos/out", captioners={}, teachers={})
    for output in ("photos", "photos/out", "."):
        with pytest.raises(UserError, match=r"Set `output` to a folder that is neither in nor above them"):
            run({**values, "output": output})
        assert sorted(os.listdir(cwd)) == ["link", "list.txt", "photos"]
        assert sorted(os.listdir("photos")) == ["a", "x.png"]
    write_tar(cwd / "data/0.tar", [("a.png", picture(2))])
    same = reinforce_here({**values, "source": "data/0.tar", "output": "data/out"})
    with pytest.raises(UserError, match="is the same as source"):
        run({**values, "source": same, "output": same})


def test_the_configs_that_come_with_the_program_write_apart_from_their_sources() -> None:
    paths = [path for path in (ROOT / "configs").rglob("*.yaml") if "/run.json" in path.read_text().partition("\n")[0]]
    assert len(paths) > 6
    assert not [path for path in paths if any(overlaps(load_config(path)))]
