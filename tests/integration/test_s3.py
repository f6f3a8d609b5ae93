"""S3 in and out, against moto's server: the same files as on a local disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import s3fs

import reinforce
from tests.helpers.data import config_of, tree
from tests.helpers.reinforced import fresh_dataset

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.mark.parametrize("images", ["embed", "reference"])
def test_a_dataset_in_s3_equals_one_on_disk_and_is_resumed(
    s3: s3fs.S3FileSystem, shards: Callable[..., str], tmp_path: Path, images: str
) -> None:
    shards(20, 6)
    s3.put(f"{tmp_path}/source/", f"bucket/{images}/source/", recursive=True)
    source = f"s3://bucket/{images}/source/{{00000..00001}}.tar"
    config = config_of(source, tmp_path / "local", images=images, captioners={})
    fresh_dataset(config)

    remote = {**config, "output": f"s3://bucket/{images}/out"}
    first = {**remote, "teachers": {"red": config["teachers"]["red"]}}
    fresh_dataset(first)
    fresh_dataset(remote)
    assert reinforce.run(remote).run is None
    files = s3.find(f"bucket/{images}/out")
    names = {f.removeprefix(f"bucket/{images}/out/"): f for f in files}
    layers = {name: s3.cat_file(path) for name, path in names.items() if not name.startswith(("runs/", "index/"))}
    assert layers == tree(tmp_path / "local")

    here = {
        sample.key: sample
        for sample in reinforce.open(str(tmp_path / "local"), images_from=f"s3://bucket/{images}/source")
    }
    for sample in reinforce.open(f"s3://bucket/{images}/out", images_from=f"s3://bucket/{images}/source"):
        assert sample.image == here[sample.key].image
        assert (sample.images["red"] == here[sample.key].images["red"]).all()


def test_a_missing_bucket_is_reported(s3: s3fs.S3FileSystem, shards: Callable[..., str]) -> None:
    with pytest.raises(reinforce.UserError, match="cannot be written"):
        reinforce.run(config_of(shards(1), "s3://no-such-bucket-here/out"))


def test_an_unreadable_source_is_reported(s3: s3fs.S3FileSystem, tmp_path: Path) -> None:
    with pytest.raises(reinforce.UserError, match="source cannot be read"):
        reinforce.run(config_of("s3://bucket/nothing/{0..9}.tar", tmp_path / "out"))
