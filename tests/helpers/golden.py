"""What stored datasets depend on: fingerprints of the shipped configs, and the content of a small dataset.

python -m tests.helpers.golden    # write tests/golden/*.json again; then SCHEMA_VERSION or a policy has changed
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from reinforce.config import Config, load_config, parse_config
from reinforce.dataset.vectors import decode
from reinforce.engine.plan.plan import build_layers, describe_models, resolve_precisions
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.models import classifiers, custom_models
from tests.helpers.published import config_of as published_config
from tests.helpers.reinforced import reinforce_here

#: The names under which the fingerprints of these classes were recorded.
sys.modules.update({"tests.helpers.custom_models": custom_models, "tests.helpers.classifiers": classifiers})
GOLDEN = Path(__file__).parents[1] / "golden"
CONFIGS = ["datacompdr12m", "datacompdr1b", "demo", "dfn5b", "dfndr12m-bf16", "dfndr12m", "dfndr2b", "probabilities"]
MODELS = "tests.helpers.models"
#: Largest difference of an embedding's value between processors: an int8 code may be another by one, 1/127.
TOLERANCE = 0.01


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
        "tag": {**clip, "codec": "int8"},
        "bf16": {**clip, "precision": "bf16", "codec": "float32"},
        "hub": {"model": "hf-hub:org/repo", "logit_scale": 7.0},
        "transformers": hub,
        "keys": {**hub, "image_size": 64, "pooling": "mean", "lowercase": True, "precision": "fp16"},
        "defaults": {**hub, "lowercase": False},
        "versioned": owned,
        "sight": {"class": f"{MODELS}:ImageOnly", "codec": "float32"},
        "reader": {"class": f"{MODELS}:TextOnly"},
    }
    captioners: dict[str, Any] = {
        "coca": coca,
        "beams": {**coca, "strategy": "diverse_beams", "captions": 6, "repetition_penalty": 1.2, "clean": {"words": 9}},
        "blip": {**hub, "strategy": "greedy", "captions": 1, "clean": {}},
        "chat": {**hub, "prompt": "Describe.", "image_size": 64, "strategy": "top_k", "precision": "bf16"},
        "server": server,
        "sampled": {
            **server, "strategy": "top_k", "options": {"min_p": 0.1}, "image_size": 64,
            "clean": {"first_sentence": True},
        },
        "class": {"class": "tests.helpers.custom_models:Writer", "captions": 3, "clean": {"characters": 50}},
    }  # fmt: skip
    places = {"source": "memory://golden/*.tar", "output": "memory://golden/out"}
    colors = {"class": "tests.helpers.classifiers:Colors", "options": {"sharpness": 2.0}, "k": 3}
    classifiers: dict[str, Any] = {
        "tag": {"model": "resnet10t.c3_in1k", "options": {"num_classes": 7}},
        "hub": {"model": "hf-hub:org/repo", "precision": "bf16", "sees": "image"},
        "class": {**colors, "temperature": 2.0},
    }
    return {
        "families": parse_config({**places, "teachers": teachers, "captioners": captioners}),
        "classifiers": parse_config({**places, "classifiers": classifiers}),
        "published": parse_config({**published_config(Path("golden")), **places}),
    }


def _fingerprints(config: Config) -> dict[str, str]:
    config, _ = resolve_precisions(config, lambda: None, lambda: [])
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
        "blue": {"class": f"{MODELS}:ColorTeacher", "options": {"size": 24, "dim": 12, "seed": 1}, "codec": "float32"},
        "small": {"class": f"{MODELS}:ColorTeacher", "options": {"size": 24, "dim": 6, "seed": 2}, "codec": "int8"},
    }
    captioners = {
        "namer": {"class": f"{MODELS}:SeedCaptioner", "captions": 2},
        "other": {"class": f"{MODELS}:SeedCaptioner", "captions": 2},
    }
    return config_of("memory://golden/*.tar", folder / "out", captioners=captioners, teachers=teachers)


def small_dataset() -> tuple[dict[str, Any], dict[str, list[float]]]:
    """What is equal on every processor of a small dataset, and the vectors of its files of embeddings.

    Equal are dataset.json's layers, the fingerprints, and of each file its schema, row groups and a digest of its rows.
    Processors round products of matrices differently, so embeddings are compared as numbers, within ``TOLERANCE``. The
    sizes of these files, which depend on the rounding too, are not in the digest of the layer's index: they are
    compared with the files.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        output = Path(reinforce_here(small_config(folder)))
        tables = {str(path.relative_to(output)): pq.ParquetFile(path) for path in sorted(output.glob("**/*.parquet"))}
        vectors = {
            name: [round(float(value), 4) for value in decode(file.read()).ravel()]
            for name, file in tables.items()
            if name.startswith("embeddings/")
        }
        files = {name: _describe(file, output) for name, file in tables.items()}
        layers = json.loads((output / "dataset.json").read_text())["layers"]
        config = parse_config(small_config(folder))
        recipes = {name: layer.fingerprint for name, layer in build_layers(config, describe_models(config)).items()}
    return {"files": files, "layers": layers, "recipes": recipes}, vectors


def _describe(file: pq.ParquetFile, output: Path) -> dict[str, Any]:
    metadata = file.metadata.metadata or {}
    footer = {key.decode(): value.decode(errors="replace") for key, value in metadata.items()}
    table = file.read()
    return {
        "fingerprint": footer.get("reinforce.fingerprint"),
        "footer": " ".join(sorted(footer)),
        "groups": [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)],
        "columns": "; ".join(f"{field.name}: {field.type}" for field in table.schema),
        "rows": hashlib.sha256(json.dumps(_exact(table, footer, output), sort_keys=True).encode()).hexdigest()[:16],
    }


def _exact(table: pa.Table, footer: dict[str, str], output: Path) -> list[Any]:
    """The rows of a table as plain values, without what depends on the folder or on the rounding of products."""
    dependent = ["url", "detail"]
    layer = footer.get("reinforce.layer", "")
    if layer.startswith("embeddings/"):
        dependent += ["embeddings", "scales", "size"]
        for row in table.to_pylist() if "size" in table.column_names else []:  # the layer's index
            assert row["size"] == (output / layer / f"{row['shard']}.parquet").stat().st_size
    kept = [name for name in table.column_names if name not in dependent]
    return [_rounded(row) for row in table.select(kept).to_pylist()]


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


def different(vectors: dict[str, list[float]], golden: dict[str, list[float]]) -> list[str]:
    """The files whose values are not those of ``golden``."""
    names = vectors.keys() | golden.keys()
    return [name for name in sorted(names) if not _close(vectors.get(name, []), golden.get(name, []))]


def _close(values: list[float], golden: list[float]) -> bool:
    return len(values) == len(golden) and np.allclose(values, golden, rtol=0, atol=TOLERANCE)


def write() -> None:
    """Write the golden files again."""
    GOLDEN.mkdir(exist_ok=True)
    dataset, vectors = small_dataset()
    for name, content in (("fingerprints", fingerprints()), ("dataset", dataset)):
        (GOLDEN / f"{name}.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(values)}" for name, values in sorted(vectors.items()))
    (GOLDEN / "vectors.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    write()
