"""Functions of shards in Ray tasks and in this process: storage that fails is tried again, errors of users end it."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from reinforce.errors import StorageError, UserError
from reinforce.nodes import for_each_shard


def length(folder: str, failing: str, shard: str) -> int:
    """The length of a shard's name. The first call for ``failing`` fails as storage does, ``bad`` as a user's error."""
    first = Path(folder, shard)
    if shard == "bad":
        raise UserError("the dataset is damaged")
    if shard == failing and not first.exists():
        first.touch()
        raise StorageError("no answer.")
    return len(shard)


@pytest.mark.parametrize("use_ray", [False, True])
def test_each_shard_has_its_result(tmp_path: Path, ray_session: None, use_ray: bool) -> None:
    function = functools.partial(length, str(tmp_path), "three")
    shards = ["a", "bc", "three"]
    assert sorted(for_each_shard(function, shards, use_ray=use_ray)) == [("a", 1), ("bc", 2), ("three", 5)]
    with pytest.raises(UserError, match=r"^the dataset is damaged$"):
        list(for_each_shard(function, ["bad"], use_ray=use_ray))
    assert list(for_each_shard(function, [], use_ray=use_ray)) == []


def test_storage_that_always_fails_ends_with_the_remedy() -> None:
    def fail(shard: str) -> None:
        raise StorageError("s3 does not answer.")

    with pytest.raises(UserError, match=r"s3 does not answer. Run the same command again to resume"):
        list(for_each_shard(fail, ["a"], use_ray=False))
