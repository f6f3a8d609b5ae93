"""The demo's files, read with tarfile, and those of its finished trainings."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

from examples.demo.compare import MEASURES
from reinforce.storage import Storage
from reinforce.training.results import Results

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "configs/demo-models"
Samples = dict[str, dict[str, bytes]]


def read_samples(path: Path) -> Samples:
    """Read a shard: contents by key and extension."""
    samples: Samples = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, extension = member.name.split(".")
            file = tar.extractfile(member)
            samples.setdefault(key, {})[extension] = file.read()
    return samples


def read_shards(shards: list[Path]) -> Samples:
    """Read several shards."""
    return {key: members for path in shards for key, members in read_samples(path).items()}


def finish_training(folder: Path, metric: float, steps: int = 300) -> None:
    """Write the files of a finished training."""
    metrics = {name: metric for _, name in MEASURES.values()}
    results = Results(str(folder), "student", steps, steps * 192, 60.0, 1_000_000, 1.0, metrics, None, 0, steps)
    results.write(Storage(str(folder)))
    rows = [{"step": step, "metrics": dict.fromkeys(metrics, metric * step / steps)} for step in (steps // 2, steps)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [{"step": 10, "loss": 5.0}, *rows]))
