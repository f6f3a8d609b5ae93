"""``make bench-select``: how well scores find wrong captions, and what choosing samples by them costs.

The demo's shards with 40 % of the captions exchanged are reinforced with its three teachers, and scored. Of each score:
how often it puts a right pair above a wrong one (AUC), and the share of wrong captions among the worst 40 %. Then
`reinforce select` chooses among copies of the scored shards, of which ten times as many are taken in each round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

import reinforce
from benchmarks.duplicates import run
from benchmarks.stored import write_results
from examples.demo.data import write_noisy_shards, write_shards

RESULTS = Path(__file__).parent / "results" / "selection.json"
BUILD = Path("build/selection")
RULES: dict[str, dict[str, Any]] = {
    "where": {"where": "scores.ensemble.caption_mean > 0.2"},
    "keep": {"keep": {"top": 0.5, "by": "scores.ensemble.caption_mean"}},
    "sample": {"sample": 1000},
}


def make_dataset() -> str:
    """Reinforce the shards with wrong captions, if that is not done yet -> the dataset."""
    write_noisy_shards("demo/noisy-shards", write_shards("demo/shards"))
    config = yaml.safe_load(Path("configs/demo.yaml").read_text())
    names, texts = [*config["teachers"]], ["caption", *config["captioners"]]
    scores = {name: {"similarity": name, "texts": texts} for name in names}
    config |= {"source": "demo/noisy-shards/*.tar", "output": str(BUILD / "dataset")}
    config["scores"] = {**scores, "ensemble": {"similarity": names, "texts": texts}}
    summary = reinforce.run(config)
    if summary.status:
        raise SystemExit(summary.message)
    return str(config["output"])


def captions(folder: Path) -> dict[str, str]:
    """The captions of the tars of a folder by key."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".txt"):
                    file = tar.extractfile(member)
                    assert file is not None
                    found[member.name.removesuffix(".txt")] = file.read().decode()
    return found


def judge_scores(url: str) -> dict[str, dict[str, float]]:
    """AUC and share of wrong captions among the worst, as many as are wrong, of each score."""
    right = captions(Path("demo/shards"))
    samples = list(reinforce.open(url, teachers=[], captioners=[]))
    wrong = np.array([sample.caption != right[sample.key] for sample in samples])
    values = {
        f"{layer.removeprefix('scores/')}.{name}": np.array([sample.values[layer][name] for sample in samples], float)
        for layer in samples[0].values
        for name in samples[0].values[layer]
    }
    for layer in {name.partition(".")[0] for name in values}:
        values[f"{layer}: caption above synthetic"] = values[f"{layer}.caption_mean"] - values[f"{layer}.coca_mean"]
    found = {name: {"AUC": auc(of, wrong), "wrong of worst": worst(of, wrong)} for name, of in values.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1]["AUC"]))


def auc(values: np.ndarray, wrong: np.ndarray) -> float:
    """How often a right pair has a larger value than a wrong one."""
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    right, all_wrong = int((~wrong).sum()), int(wrong.sum())
    return float((ranks[~wrong].sum() - right * (right - 1) / 2) / (right * all_wrong))


def worst(values: np.ndarray, wrong: np.ndarray) -> float:
    return float(wrong[np.argsort(values, kind="stable")[: wrong.sum()]].mean())


def copies(url: str, count: int) -> str:
    """A dataset with ``count`` copies of each shard, as links to its files."""
    folder = BUILD / f"copies-{count}"
    shutil.rmtree(folder, ignore_errors=True)
    manifest = json.loads(Path(url, "dataset.json").read_text())
    layers = [name for name in manifest["layers"] if name == "samples" or name.startswith("scores/")]
    for layer in layers:
        (folder / layer).mkdir(parents=True)
        for path in Path(url, layer).glob("*.parquet"):
            for number in range(count):
                os.link(path, folder / layer / f"copy{number}-{path.name}")
    manifest["layers"] = {name: entry for name, entry in manifest["layers"].items() if name in layers}
    manifest.pop("digest", None)  # of all layers
    (folder / "dataset.json").write_text(json.dumps(manifest))
    return str(folder)


def measure(url: str, count: int) -> Iterator[tuple[str, dict[str, float]]]:
    """CPU microseconds a sample of each rule, and bytes a sample of the view."""
    dataset = copies(url, count)
    for name, rule in RULES.items():
        cost = run(dataset, rule, name)
        shown = {key: cost[key] for key in ("samples", "CPU us a sample", "bytes a sample")}
        yield name, {**shown, "us a sample": 1e6 * cost["seconds"] / cost["samples"]}


def print_scores(scores: Mapping[str, Mapping[str, float]]) -> None:
    table = Table("score", "AUC", "wrong among the worst 40 %")
    for name, values in scores.items():
        table.add_row(name, f"{values['AUC']:.3f}", f"{values['wrong of worst']:.1%}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection", description=__doc__)
    parser.add_argument("--copies", type=int, nargs="+", default=[10, 100], help="copies of the three shards")
    arguments = parser.parse_args()
    url = make_dataset()
    scores = judge_scores(url)
    print_scores(scores)
    costs = {str(3 * count): dict(measure(url, count)) for count in arguments.copies}
    table = Table("shards", "rule", "samples", "CPU us a sample", "bytes a sample")
    for shards, rules in costs.items():
        for rule, values in rules.items():
            table.add_row(
                shards,
                rule,
                f"{values['samples']:,}",
                f"{values['CPU us a sample']:.1f}",
                f"{values['bytes a sample']:.1f}",
            )
    Console().print(table)
    write_results(RESULTS, ["pyarrow", "duckdb", "numpy"], {"scores": scores, "costs by shards": costs})


if __name__ == "__main__":
    main()
