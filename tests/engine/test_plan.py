"""Planning: what is missing, at the scale of DFN-5B, and what stops it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import s3fs

from reinforce.cli import main
from reinforce.config import parse_config
from reinforce.dataset.store import Store
from reinforce.engine.estimate import expected_bytes
from reinforce.engine.plan import make_plan, source_shards
from reinforce.engine.recipe import build_layers, describe_models
from reinforce.errors import UserError
from schemas import Reason
from tests.helpers.data import config_of, members_of

ROOT = Path(__file__).parents[2]


def layers_for(**changes: Any) -> dict[str, str]:
    config = parse_config(config_of("x/{0..1}.tar", "out", **changes))
    return {name: layer.fingerprint for name, layer in build_layers(config, describe_models(config)).items()}


def test_planning_a_hundred_thousand_shards_is_quick_and_lean(tmp_path: Path) -> None:
    code = f"""
import re, time
start = time.perf_counter()
from reinforce.cli import main
try:
    main(["plan", "configs/dfn5b.yaml", "--set", "source={tmp_path}/{{000000..099999}}.tar",
          "--set", "output={tmp_path}/out"])
except SystemExit as end:
    assert not end.code, end.code
print("seconds", time.perf_counter() - start)
status = open("/proc/self/status").read()  # getrusage would count the process that forked this one
print("megabytes", int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = dict(line.split() for line in done.stdout.splitlines() if line.startswith(("seconds", "megabytes")))
    assert "100,000 shards" in done.stdout
    assert float(figures["seconds"]) < 10
    assert float(figures["megabytes"]) < 500


def test_limits_that_came_later_change_fingerprints_only_where_they_are_set(shards: Callable[..., str]) -> None:
    def samples(**limits: int) -> str:
        config = parse_config({"source": shards(1), "output": "out", "input": {"limits": limits}})
        return build_layers(config, {})["samples"].fingerprint

    assert samples() == "9a59ea0ee9feb030", "every dataset made with the defaults so far has this one"
    assert samples(members=64) == samples()
    assert len({samples(), samples(members=65), samples(key_chars=10), samples(shard_samples=9)}) == 4


def test_what_changes_no_stored_number_changes_no_fingerprint() -> None:
    config = config_of("x/{0..1}.tar", "out")
    before = layers_for()
    config["teachers"]["red"]["logit_scale"] = 99.0
    assert layers_for(teachers=config["teachers"], workers={"cpus": 4, "batch": 3}) == before


def test_a_change_reaches_the_layers_that_depend_on_it_and_no_others() -> None:
    before = layers_for()
    config = config_of("x/{0..1}.tar", "out")
    config["captioners"]["namer"] |= {"captions": 3, "options": {"captions": 3}}
    changed = {n for n, f in layers_for(captioners=config["captioners"]).items() if before[n] != f}
    assert changed == {"captions/namer", "embeddings/red/namer", "embeddings/blue/namer"}
    assert all(before[name] != fingerprint for name, fingerprint in layers_for(seed=1).items())
    config = config_of("x/{0..1}.tar", "out")
    config["teachers"]["blue"]["dtype"] = "float32"
    changed = {n for n, f in layers_for(teachers=config["teachers"]).items() if before[n] != f}
    assert changed == {"embeddings/blue/images", "embeddings/blue/caption", "embeddings/blue/namer"}


def test_a_changed_fingerprint_is_reported_with_both_values(shards: Callable[..., str], tmp_path: Path) -> None:
    source = shards(2)
    config = parse_config(config_of(source, tmp_path / "out"))
    plan = make_plan(config)
    Store(config.output).write_json({"layers": {"samples": {"fingerprint": "0123"}}}, "dataset.json")
    with pytest.raises(UserError) as caught:
        make_plan(config)
    for part in ("0123", plan.layers["samples"].fingerprint, "another `output`", str(tmp_path / "out")):
        assert part in str(caught.value)


def test_the_same_shard_twice_is_reported(shards: Callable[..., str], tmp_path: Path) -> None:
    shards(1)
    url = f"{tmp_path}/source/00000.tar"
    with pytest.raises(UserError, match="same shard name"):
        source_shards(parse_config(config_of([url, f"{tmp_path}/source/../source/00000.tar"], "out")))  # type: ignore[arg-type]


def test_references_into_compressed_tars_are_refused() -> None:
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


def test_expected_bytes_come_near_what_is_written(shards: Callable[..., str], tmp_path: Path) -> None:
    config = config_of(shards(200), tmp_path / "out")
    config["teachers"]["eye"] = {"class": "tests.helpers.models:ImageOnly"}
    expected = expected_bytes(make_plan(parse_config(config)))
    assert expected["embeddings/eye/images"] == pytest.approx(200 * 2 * 5 * 2, rel=0.05)
    assert expected["embeddings/red/images"] is None, "its dimension is known once it is loaded"
    images = sum(len(data) for name, data in members_of(0, 200) if name.endswith(".png"))
    samples = expected["samples"]
    assert samples is not None
    assert images < samples < 1.3 * images


def test_a_source_that_lets_nobody_in_is_told_beside_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    changes = ["--set", "source=s3://nobody/x.tar", "--set", f"output={tmp_path}/out"]
    with pytest.raises(SystemExit, match="0"):
        main(["plan", str(ROOT / "configs/dfn5b.yaml"), *changes])
    told = capsys.readouterr()
    assert "1 shards, 1 with something missing" in told.out
    assert "sizes are not known: source cannot be read: s3://nobody/x.tar: NoCredentialsError" in told.err
    s3fs.S3FileSystem.clear_instance_cache()
