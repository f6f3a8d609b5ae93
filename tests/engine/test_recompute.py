"""``reinforce validate --recompute``: random rows against what the models compute."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from reinforce.config import parse_config
from reinforce.engine.recompute import recompute
from tests.helpers.commands import printed_by, run_command
from tests.helpers.data import config_of, tree
from tests.helpers.decoding import decode_pool
from tests.helpers.reinforced import small_dataset


def test_rows_computed_again_by_a_config_are_equal_until_a_layer_has_values_of_another_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = small_dataset(tmp_path, (8, 5, 3))
    data = config_of(f"{tmp_path}/source/*.tar", "elsewhere")
    before = tree(Path(url))
    found = recompute(parse_config(data), url, 6, pool=decode_pool())
    assert (found.findings(), found.left_out) == ([], [])
    assert found.layers.keys() == {f"{Path(name).parent}" for name in before} - {"samples", "."}
    assert {(one.rows, one.equal, one.nulls) for one in found.layers.values()} == {(6, 6, 0)}
    assert {one.difference for one in found.layers.values()} == {0.0, None}
    assert tree(Path(url)) == before

    for path in Path(url, "embeddings/red/images").iterdir():
        table = pq.read_table(path)
        values = -table["embeddings"].combine_chunks().to_numpy_ndarray()
        table = table.set_column(1, table.schema.field(1), pa.FixedShapeTensorArray.from_numpy_ndarray(values))
        pq.write_table(table, path, compression="none", row_group_size=8)
    data["teachers"]["blue"]["options"]["seed"] = 2
    data["captioners"]["gone"] = {"class": "tests.helpers.models:NoSuchCaptioner"}
    Path(tmp_path, "config.yaml").write_text(yaml.safe_dump(data))
    monkeypatch.setattr("reinforce.engine.recompute.DecodePool", lambda *_: decode_pool())
    monkeypatch.setattr(decode_pool(), "close", lambda: None)
    options = ("--recompute", "4", "--config", f"{tmp_path}/config.yaml", "--seed", "3", "--json")
    report = json.loads(printed_by(capsys, "validate", url, *options, status=1))
    assert [(one["kind"], one["layer"]) for one in report["findings"]] == [("rows", "embeddings/red/images")]
    layers = {one["layer"]: one for one in report["recomputed"]["layers"]}
    wrong = layers.pop("embeddings/red/images")
    assert (wrong["fits"], wrong["equal"], round(wrong["cosine"], 3)) == (False, 0, -1.0)
    assert {one["fits"] for one in layers.values()} == {True}
    left_out = report["recomputed"]["left_out"]
    assert [line.partition(":")[0] for line in left_out] == [
        "captioner gone", "embeddings/blue/images", "embeddings/blue/caption", "embeddings/blue/namer"
    ]  # fmt: skip
    status, _, err = run_command(capsys, "validate", url, "--recompute", "4")
    assert (status, "--recompute needs --config" in err) == (2, True)
