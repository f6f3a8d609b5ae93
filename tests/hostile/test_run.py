"""Runs over shards with every defect: each sample is a row, or in quarantine with its reason; and over an image and a
model that hang, of which the first costs only its sample, the second only its shard."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import reinforce
from reinforce.engine.driver import worker_pool as polls
from reinforce.engine.record import RunSummary
from reinforce.images.policy import decode
from reinforce.source.config import Limits
from reinforce.source.urls import shard_name
from tests.helpers.data import config_of, members_of, picture, tree, write_tar
from tests.hostile.images import IMAGE_BYTES, IMAGES, ImageCase, scan_bomb
from tests.hostile.table import slug
from tests.hostile.tars import KEY_CHARS, SHARD_SAMPLES, TARS, TarCase
from tests.hostile.texts import MEMBERS, SIDECAR_BYTES, TEXTS, TextCase

LIMITS = Limits(
    image_bytes=IMAGE_BYTES,
    sidecar_bytes=SIDECAR_BYTES,
    members=MEMBERS,
    key_chars=KEY_CHARS,
    shard_samples=SHARD_SAMPLES,
)
CONFIG: dict[str, Any] = {
    "captioners": {},
    "input": {"limits": LIMITS},
    "teachers": {"red": {"class": "tests.helpers.models:ColorTeacher", "options": {"size": 16, "dim": 8}}},
}


@dataclass(frozen=True)
class Outcome:
    """The output of a run over all cases. ``refused`` and ``of_shard`` are quarantine/samples by shard."""

    output: Path
    shards: dict[str, str]  # by defect, or `images` and `texts`
    summary: RunSummary
    rows: dict[str, list[dict[str, Any]]]
    refused: dict[str, dict[str, list[str]]]
    of_shard: dict[str, list[tuple[str, str]]]  # with the detail
    details: list[str]

    def row(self, shard: str, key: str) -> dict[str, Any] | None:
        return next((row for row in self.rows.get(shard, []) if row["key"] == key), None)


@pytest.fixture(scope="module")
def outcome(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    source = tmp_path_factory.mktemp("hostile")
    paths = {case.defect: source / f"{slug(case.defect)}{case.ending}" for case in TARS}
    for case in TARS:
        case.write(paths[case.defect])
    write_tar(source / "images.tar", [m for c in IMAGES for m in
        ((f"{slug(c.defect)}.{c.extension}", c.data()), (f"{slug(c.defect)}.txt", b"a thing"))])  # fmt: skip
    write_tar(source / "texts.tar", [m for c in TEXTS for m in
        ((f"{slug(c.defect)}.png", picture(1)), *((f"{slug(c.defect)}.{e}", d) for e, d in c.members()))])  # fmt: skip
    paths |= {"images": source / "images.tar", "texts": source / "texts.tar"}
    output = tmp_path_factory.mktemp("out")
    urls = [str(path) for path in paths.values()]
    summary = reinforce.run(config_of(urls, output, **CONFIG))  # type: ignore[arg-type]

    shards = {defect: shard_name(str(path)) for defect, path in paths.items()}
    rows, refused, of_shard, details = {}, {}, {}, []
    for shard in shards.values():
        file, quarantine = output / "samples" / f"{shard}.parquet", output / "quarantine/samples" / f"{shard}.parquet"
        if file.exists():
            rows[shard] = pq.read_table(file).to_pylist()
        quarantined = pq.read_table(quarantine).to_pylist() if quarantine.exists() else []
        of_shard[shard] = [(row["reason"], row["detail"]) for row in quarantined if row["key"] is None]
        details += [row["detail"] for row in quarantined]
        refused[shard] = {}
        for row in quarantined:
            if row["key"] is not None:
                refused[shard].setdefault(row["key"], []).append(row["reason"])
    return Outcome(output, shards, summary, rows, refused, of_shard, details)


@pytest.mark.parametrize("case", IMAGES, ids=lambda case: slug(case.defect))
def test_images(outcome: Outcome, case: ImageCase) -> None:
    shard, key = outcome.shards["images"], slug(case.defect)
    row = outcome.row(shard, key)
    assert outcome.refused[shard].get(key, []) == ([case.refused] if case.refused else [])
    assert (row is None) == bool(case.refused)
    if row is not None:
        assert row["image"] == case.data()
        assert (row["width"], row["height"]) == case.size
        if case.colour is not None:
            pixels = np.asarray(decode(row["image"], Limits()), float)
            assert np.abs(pixels.mean(axis=(0, 1)) - case.colour).max() < 6


@pytest.mark.parametrize("case", TEXTS, ids=lambda case: slug(case.defect))
def test_texts(outcome: Outcome, case: TextCase) -> None:
    shard, key = outcome.shards["texts"], slug(case.defect)
    row = outcome.row(shard, key)
    assert (row["caption"], row["metadata"]) == (case.caption, case.metadata)
    assert outcome.refused[shard].get(key, []) == list(case.reasons)
    without_text = pq.read_table(outcome.output / f"quarantine/embeddings/red/caption/{shard}.parquet").to_pylist()
    assert (key in {r["key"] for r in without_text if r["reason"] == "no_text"}) == (case.caption is None)


@pytest.mark.parametrize("case", TARS, ids=lambda case: slug(case.defect))
def test_tars(outcome: Outcome, case: TarCase) -> None:
    shard = outcome.shards[case.defect]
    assert [row["key"] for row in outcome.rows.get(shard, [])] == list(case.rows)
    assert {key: tuple(reasons) for key, reasons in outcome.refused[shard].items()} == dict(case.refused)
    assert tuple(dict.fromkeys(reason for reason, _ in outcome.of_shard[shard])) == case.shard
    if not case.shard:  # otherwise the refusal of the shard covers the keys that are lost
        reported = {key[:100] if len(key) > KEY_CHARS else key for key in case.keys}
        assert reported == {*case.rows, *case.refused}


def test_every_sample_is_a_row_or_refused_or_in_a_damaged_shard(outcome: Outcome) -> None:
    expected = [("images", slug(c.defect)) for c in IMAGES] + [("texts", slug(c.defect)) for c in TEXTS]
    expected += [(case.defect, key[:100] if len(key) > KEY_CHARS else key) for case in TARS for key in case.keys]
    rows = {(defect, row["key"]) for defect, shard in outcome.shards.items() for row in outcome.rows.get(shard, [])}
    refused = {(defect, key) for defect, shard in outcome.shards.items() for key in outcome.refused[shard]}
    damaged = {defect for defect, shard in outcome.shards.items() if outcome.of_shard[shard]}
    assert {defect for defect, key in {*expected} - rows - refused} <= damaged
    assert (rows | refused) - {*expected} == set(), "no sample is made up"


def test_the_summary_and_the_layers_agree_with_the_quarantine(outcome: Outcome) -> None:
    counted = Counter(reason for reasons in outcome.of_shard.values() for reason, _ in reasons)
    counted.update(r for refused in outcome.refused.values() for reasons in refused.values() for r in reasons)
    for layer in ("images", "caption"):
        for path in (outcome.output / "quarantine/embeddings/red" / layer).glob("*.parquet"):
            counted.update(pq.read_table(path)["reason"].to_pylist())
    assert outcome.summary.refused == counted
    assert outcome.summary.samples >= sum(map(len, outcome.rows.values()))
    whole = {"shard_missing", "shard_unreadable", "shard_unsorted"}
    assert outcome.summary.quarantined_shards == sum(not whole.isdisjoint(dict(r)) for r in outcome.of_shard.values())
    for layer in ("embeddings/red/images", "embeddings/red/caption"):
        files = {path.stem: path for path in (outcome.output / layer).glob("*.parquet")}
        assert files.keys() == outcome.rows.keys()
        for shard, file in files.items():
            assert pq.read_table(file, columns=["key"])["key"].to_pylist() == [r["key"] for r in outcome.rows[shard]]


def test_details_name_the_byte_of_damage_and_the_limit(outcome: Outcome) -> None:
    damaged = [d for details in outcome.of_shard.values() for reason, d in details if reason == "shard_damaged"]
    assert len(damaged) > 10
    assert all(re.match(r"damaged at byte \d+: ", detail) for detail in damaged)
    details = " ".join(outcome.details)
    named = {name for name in Limits.model_fields if f"limits.{name}" in details}
    assert named == Limits.model_fields.keys() - {"caption_chars"}, "captions are cut, not refused"


def test_names_in_a_tar_are_never_used_as_paths(outcome: Outcome) -> None:
    names = "|".join(re.escape(name) for name in ("etc", "passwd", "x.png", "x.txt", "[red]"))
    assert not [name for name in tree(outcome.output, layers_only=False) if re.search(f"(^|/)({names})($|/)", name)]
    assert not (outcome.output.parent / "x.png").exists()


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
    config["input"] = {"limits": Limits(scans=100_000)}
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
    assert "(limit: failures.stall_seconds = 6)" in hung["detail"]
    layer = out / "embeddings" / "ill" / "caption"
    assert pq.read_table(layer / f"{names['0-bomb']}.parquet")["key"].to_pylist() == ["00900000", "00900002"]
    assert {p.stem for p in layer.glob("*.parquet")} & set(names.values()) == {names["0-bomb"]}
    assert len(list(layer.glob("*.parquet"))) == 3
