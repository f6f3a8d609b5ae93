"""An image whose decoder hangs costs only its sample, a model that hangs only its shard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import reinforce
from reinforce.engine.driver import polls
from reinforce.source.urls import shard_name
from tests.helpers.data import config_of, members_of, write_tar
from tests.hostile.images import scan_bomb

pytestmark = pytest.mark.usefixtures("ray_session")


def test_a_slow_image_costs_its_sample_and_a_hung_model_its_shard(
    shards: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polls, "POLL_SECONDS", 0.2)
    source = shards(*[6] * 3)
    bomb = members_of(9, 3)
    bomb[3] = (bomb[3][0].replace("png", "jpg"), scan_bomb(4_000))  # takes three minutes; two seconds are allowed
    write_tar(tmp_path / "source" / "0-bomb.tar", bomb)
    config = config_of(source, tmp_path / "out", captioners={})
    config["input"] = {"limits": {"scans": 100_000}}
    config["failures"] = {"allowed_share": 1.0, "solo_attempts": 1, "sample_seconds": 2.0, "stall_seconds": 6.0}
    config["workers"] = {"batch": 16, "max": 1}  # both are in flight in one worker, so both are suspects
    config["teachers"] = {
        "ill": {
            "class": "tests.helpers.models:FailingTeacher",
            "options": {"trigger": "thing 4 of shard 0", "failure": "hang"},
        }
    }
    summary = reinforce.run(config)
    assert (summary.status, summary.shards, summary.quarantined_shards) == (0, 4, 1)
    names = {stem: shard_name(f"{tmp_path}/source/{stem}.tar") for stem in ("0-bomb", "00000")}
    out = tmp_path / "out"
    refused = {p.stem: pq.read_table(p).to_pylist() for p in (out / "quarantine" / "samples").glob("*.parquet")}
    assert refused.keys() == set(names.values())
    [slow], [hung] = (refused[names[stem]] for stem in ("0-bomb", "00000"))
    assert (slow["key"], slow["reason"]) == ("00900001", "image_hung")
    assert "failures.sample_seconds = 2, 1 times" in slow["detail"]
    assert (hung["key"], hung["reason"]) == (None, "shard_hung")
    assert "the worker has not answered for 6 s" in hung["detail"], "the model holds the interpreter lock"
    assert "in layer embeddings/ill/caption (6 texts, the first " in hung["detail"]
    assert "(limit: failures.stall_seconds = 6)" in hung["detail"]
    layer = out / "embeddings" / "ill" / "caption"
    assert pq.read_table(layer / f"{names['0-bomb']}.parquet")["key"].to_pylist() == ["00900000", "00900002"]
    assert {p.stem for p in layer.glob("*.parquet")} & set(names.values()) == {names["0-bomb"]}
    assert len(list(layer.glob("*.parquet"))) == 3
