"""What stored datasets depend on: fingerprints of the shipped configs, and the content of a small dataset.

python -m tests.helpers.golden    # write tests/golden/*.json again; then SCHEMA_VERSION or a policy has changed
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from reinforce.config import Config, load_config, parse_config
from reinforce.dataset.files.store import Store
from reinforce.engine.plan.precision import resolve_precisions
from reinforce.engine.plan.recipe import build_layers, describe_models
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.published import config_of as published_config
from tests.helpers.reinforced import reinforce_here

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIGS = ["datacompdr12m", "datacompdr1b", "demo", "dfn5b", "dfndr12m-bf16", "dfndr12m", "dfndr2b"]
MODELS = "tests.helpers.models"


def fingerprints() -> dict[str, dict[str, str]]:
    """The fingerprint of every layer of the shipped run configs."""
    shipped = {name: load_config(f"configs/{name}.yaml") for name in [*CONFIGS, "demo-teachers/samples"]}
    return {name: _fingerprints(config) for name, config in {**shipped, **_families()}.items()}


def _families() -> dict[str, Config]:
    """Configs with models of each family that need no weights, and with each of their keys that fingerprints cover."""
    hub = {"family": "transformers", "model": "org/repo"}
    clip = {"model": "ViT-L-14", "pretrained": "dfn2b_s39b"}
    coca = {"model": "coca_ViT-L-14", "pretrained": "laion2b_s13b_b90k"}
    owned = {"class": "tests.helpers.custom_models:Radiology", "options": {"weights": "s3://me:secret@b/a.pt"}}
    server = {"family": "openai", "url": "http://host:8000", "model": "m", "prompt": "Describe.", "captions": 2}
    teachers: dict[str, Any] = {
        "tag": {**clip, "dtype": "int8"},
        "bf16": {**clip, "precision": "bf16", "dtype": "float32"},
        "hub": {"model": "hf-hub:org/repo", "logit_scale": 7.0},
        "transformers": hub,
        "keys": {**hub, "image_size": 64, "pooling": "mean", "lowercase": True, "precision": "fp16"},
        "defaults": {**hub, "lowercase": False},
        "versioned": owned,
        "sight": {"class": f"{MODELS}:ImageOnly", "dtype": "float32"},
        "reader": {"class": f"{MODELS}:TextOnly"},
    }
    captioners: dict[str, Any] = {
        "coca": coca,
        "beams": {**coca, "strategy": "diverse_beams", "captions": 6, "repetition_penalty": 1.2, "clean": {"words": 9}},
        "blip": {**hub, "strategy": "greedy", "captions": 1, "clean": {}},
        "chat": {**hub, "prompt": "Describe.", "image_size": 64, "strategy": "top_k", "precision": "bf16"},
        "server": server,
        "sampled": {
            **server, "strategy": "top_k", "options": {"min_p": 0.1}, "image_size": 64, "image_quality": 70,
            "clean": {"first_sentence": True},
        },
        "class": {"class": "tests.helpers.custom_models:Writer", "captions": 3, "clean": {"characters": 50}},
    }  # fmt: skip
    places = {"source": "memory://golden/*.tar", "output": "memory://golden/out"}
    return {
        "families": parse_config({**places, "teachers": teachers, "captioners": captioners}),
        "published": parse_config({**published_config(Path("golden")), **places}),
    }


def _fingerprints(config: Config) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        config, _ = resolve_precisions(config, Store(f"{folder}/absent"), lambda: [])
    layers = build_layers(config, describe_models(config))
    return {name: layer.fingerprint for name, layer in layers.items()}


def small_config(folder: Path) -> dict[str, Any]:
    """Two captioners and three teachers, one of int8, over two shards with a broken image."""
    memory = fsspec.filesystem("memory")  # names of shards depend on the folder of the source
    for shard, count in enumerate((11, 6)):
        members = members_of(shard, count)
        if shard:
            members[0] = (members[0][0], b"no image")
        name = f"{shard:05d}.tar"
        memory.pipe_file(f"/golden/{name}", write_tar(folder / name, members).read_bytes())
    teachers = {
        "red": {"class": f"{MODELS}:ColorTeacher", "options": {"size": 16, "dim": 8}, "logit_scale": 50.0},
        "blue": {"class": f"{MODELS}:ColorTeacher", "options": {"size": 24, "dim": 12, "seed": 1}, "dtype": "float32"},
        "small": {"class": f"{MODELS}:ColorTeacher", "options": {"size": 24, "dim": 6, "seed": 2}, "dtype": "int8"},
    }
    captioners = {
        "namer": {"class": f"{MODELS}:SeedCaptioner", "captions": 2},
        "other": {"class": f"{MODELS}:SeedCaptioner", "captions": 2},
    }
    return config_of("memory://golden/*.tar", folder / "out", captioners=captioners, teachers=teachers)


def small_dataset() -> dict[str, Any]:
    """For each file of a small dataset its fingerprint and a digest of its rows; and dataset.json's layers.

    Vectors count to two decimals, since processors round products of matrices differently.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        output = Path(reinforce_here(small_config(folder)))
        files = {str(path.relative_to(output)): _describe(path) for path in sorted(output.glob("**/*.parquet"))}
        layers = json.loads((output / "dataset.json").read_text())["layers"]
        config = parse_config(small_config(folder))
        recipes = {name: layer.fingerprint for name, layer in build_layers(config, describe_models(config)).items()}
    return {"files": files, "layers": layers, "recipes": recipes}


def _describe(path: Path) -> dict[str, Any]:
    file = pq.ParquetFile(path)
    footer = {key.decode(): value.decode(errors="replace") for key, value in (file.metadata.metadata or {}).items()}
    table = file.read()
    return {
        "fingerprint": footer.get("fingerprint"),
        "footer": " ".join(sorted(footer)),
        "groups": [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)],
        "columns": "; ".join(f"{field.name}: {field.type}" for field in table.schema),
        "rows": hashlib.sha256(json.dumps(_plain(table), sort_keys=True).encode()).hexdigest()[:16],
    }


def _plain(table: pa.Table) -> list[Any]:
    paths = [name for name in table.column_names if name in ("url", "detail")]
    return [_rounded(row) for row in table.drop_columns(paths).to_pylist()]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    if hasattr(value, "tolist"):
        return _rounded(value.tolist())
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return round(value, 2) + 0.0 if isinstance(value, float) else value


def write() -> None:
    """Write the golden files again."""
    GOLDEN.mkdir(exist_ok=True)
    for name, content in (("fingerprints", fingerprints()), ("dataset", small_dataset())):
        (GOLDEN / f"{name}.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    write()
