"""Small reinforced datasets, made by the real pipeline in this process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from reinforce.config import parse_config
from reinforce.manifest import update_manifest
from reinforce.models import load_models
from reinforce.plan import make_plan
from reinforce.shard import process_shard
from reinforce.store import MANIFEST, Store


def reinforce_here(config: dict[str, Any]) -> str:
    """Compute what is missing of a config, without Ray, and return the dataset's URL."""
    parsed = parse_config(config)
    plan, store = make_plan(parsed), Store(parsed.output)
    models = load_models(parsed, plan.layers.values())
    loaded = {name: {"dim": teacher.dim} for name, teacher in models.teachers.items()}
    with ThreadPoolExecutor(1) as pool:
        for work in plan.work:
            process_shard(work, parsed, plan.layers, store, models, pool)
    store.write_json(update_manifest(store.read_json(MANIFEST), parsed, plan.layers, loaded), MANIFEST)
    return parsed.output
