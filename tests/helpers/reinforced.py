"""Small reinforced datasets, made in this process by the code that workers run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reinforce.config import parse_config
from reinforce.dataset.index import IndexWriter, set_aside
from reinforce.dataset.manifest import DIGEST_KEY, check_loaded, update_manifest, write_manifest
from reinforce.dataset.store import MANIFEST, Store
from reinforce.engine.messages import ShardResult
from reinforce.engine.plan.plan import Plan, make_plan
from reinforce.engine.plan.source_shards import write_lists
from reinforce.engine.run import check_codebooks, fit_codebooks
from reinforce.engine.worker.models import describe_loaded, load_models
from reinforce.engine.worker.shard import GROUP_ROWS, ShardProcess
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.decoding import decode_pool


def reinforce_here(config: dict[str, Any], group_rows: int = 8, results: list[ShardResult] | None = None) -> str:
    """Compute the missing layers of a config, without Ray and in small row groups; returns the dataset's URL.

    ``results`` collects those of the shards.
    """
    parsed = parse_config(config)
    plan = make_plan(parsed)
    if plan.unfitted:
        fit_codebooks(plan, lambda finer, shards: _compute(make_plan(finer).first(shards), group_rows))
        plan = make_plan(parsed)
    check_codebooks(plan)
    postponed = _compute(plan, group_rows, results)
    return reinforce_here(config, group_rows, results) if postponed else parsed.output


def _compute(plan: Plan, group_rows: int, results: list[ShardResult] | None = None) -> bool:
    """Compute the pending shards of a plan -> whether files were set aside."""
    parsed, store = plan.config, Store(plan.config.output)
    write_lists(store, plan.lists)
    models = load_models(parsed, plan.layers.values())
    loaded = describe_loaded(models, parsed)
    check_loaded(store, store.read_json(MANIFEST), plan.layers, loaded)
    index = IndexWriter(store, plan.layers)
    for file in plan.recomputed:
        set_aside(store, file.layer, file.shard)
    postponed = False
    for shard in plan.pending:
        result = ShardProcess(shard, parsed, plan.layers, store, models, decode_pool(), group_rows).run()
        index.add(shard.name, result.files)
        if results is not None:
            results.append(result)
        postponed |= bool(result.set_aside)
    index.flush()
    write_manifest(store, update_manifest(store.read_json(MANIFEST), parsed, plan.layers, loaded, plan.layers))
    return postponed


def shard_process(config: dict[str, Any], group_rows: int = 8) -> ShardProcess:
    """The first shard of a config that lacks layers, to be run as in a worker."""
    parsed = parse_config(config)
    plan = make_plan(parsed)
    models = load_models(parsed, plan.layers.values())
    return ShardProcess(plan.pending[0], parsed, plan.layers, Store(parsed.output), models, decode_pool(), group_rows)


def config_for(made: Path, output: Path | str | None = None, **changes: Any) -> dict[str, Any]:
    """The config of a dataset next to its ``source``, for another output, with changes."""
    return config_of(f"{made.parent}/source/*.tar", output or made, **changes)


def manifest_to_change(dataset: Path | str) -> dict[str, Any]:
    """The content of dataset.json without its digest: readers accept what is changed in it and written."""
    content: dict[str, Any] = json.loads(Path(dataset, MANIFEST).read_text())
    content.pop(DIGEST_KEY, None)
    return content


def flip(path: Path, column: str, from_end: int = 0) -> None:
    """Change a bit in the middle of the first pages of a file's column, or ``from_end`` bytes before their end."""
    group = pq.ParquetFile(path).metadata.row_group(0)
    leaves = (group.column(i) for i in range(group.num_columns))
    leaf = next(leaf for leaf in leaves if leaf.path_in_schema.startswith(column))
    content, size = bytearray(path.read_bytes()), leaf.total_compressed_size
    content[leaf.data_page_offset + (size - from_end if from_end else size // 2)] ^= 0x10
    path.write_bytes(content)


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Write a file again with changed rows of the same columns, in its row groups, with its footer and checksums."""
    file = pq.ParquetFile(path)
    sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    table, start = change(file.read()).cast(file.schema_arrow), 0
    with pq.ParquetWriter(path, file.schema_arrow, compression="none", write_page_checksum=True) as writer:
        for rows in sizes:
            writer.write_table(table.slice(start, rows), row_group_size=rows)
            start += rows


def fresh_dataset(config: dict[str, Any]) -> Path:
    """The dataset of a config, with the same files as by an undisturbed run on Ray, which takes five seconds more."""
    return Path(reinforce_here(config, GROUP_ROWS))


def small_dataset(folder: Path, sizes: Sequence[int] = (21, 9, 14), **changes: Any) -> str:
    """A dataset of shards with these numbers of samples and the teachers and captioner of ``config_of``."""
    for number, size in enumerate(sizes):
        write_tar(folder / "source" / f"{number:05d}.tar", members_of(number, size))
    return reinforce_here(config_of(f"{folder}/source/*.tar", folder / "out", **changes))
