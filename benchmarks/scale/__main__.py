"""python -m benchmarks.scale: measure the control plane, and write the results and its part of the page."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.pipeline.figures import Figure
from benchmarks.pipeline.page import PAGE, make_table
from benchmarks.scale import page
from benchmarks.scale.driver import driver_figures
from benchmarks.scale.inputs import (
    CONFIG,
    DFN5B,
    environment,
    make_content,
    overrides,
    running_job,
    write_manifest,
    write_shards,
)
from benchmarks.scale.object_store import counts, serve
from benchmarks.stored import update_page, write_results
from reinforce.source.urls import shard_names
from teachers.redact import Redactor

PACKAGES = ("ray", "s3fs", "botocore", "pyarrow")
_LOCAL_LAYERS = ("samples", "embeddings/t/images", "embeddings/t/caption")
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Scale:
    """How much is measured. ``seconds`` is the time of a request, ``watch_seconds`` for how long the driver runs."""

    shards: int = DFN5B
    seconds: float = 0.1
    local_shards: int = 1_000_000
    workers: int = 10_000
    watch_seconds: float = 40.0
    urls: int = 10_000
    local_files: int = 16_000


QUICK = Scale(3000, 0.01, 3000, 100, 1.0, 100, 160)


def measure_resume(scale: Scale) -> list[Figure]:
    """Planning the rest of a run in an object store: a hundred shards are missing, and a thousand quarantined."""
    missing, quarantined = scale.shards // 100, scale.shards // 200
    content = make_content(scale.shards, scale.seconds, missing, quarantined)
    with serve(content) as address:
        found = run_child(["plan", str(CONFIG), *overrides(scale.shards)], environment(address))
        requests = counts(address)
    assert found["pending"] == missing - quarantined, found
    section = f"resuming {scale.shards:,} shards x 8 layers in S3, {scale.seconds:g} s a request"
    return [
        Figure(section, "time", found["seconds"], "s", 40.0, "at most"),
        Figure(section, "CPU", found["cpu"], "s"),
        Figure(section, "peak of memory", found["MB"], "MB", 600.0, "at most"),
        Figure(section, "listing requests", requests["LIST"], ""),
        Figure(section, f"reading requests, {quarantined:,} of them for quarantined shards", requests["GET"], ""),
    ]


def measure_start(scale: Scale) -> list[Figure]:
    """Opening the dataset of a training in an object store, by one rank."""
    with serve(make_content(scale.shards, scale.seconds)) as address:
        found = run_child(["start", "s3://bucket/data", "s3://bucket/dfn5b"], environment(address))
        requests = counts(address)
    assert found["rows"] == 2 * scale.shards, found
    section = f"start of a training on {scale.shards:,} shards x 8 layers in S3, {scale.seconds:g} s a request"
    return [
        Figure(section, "time", found["seconds"], "s", 60.0, "at most"),
        Figure(section, "CPU of a rank", found["cpu"], "s"),
        Figure(section, "peak of memory of a rank", found["MB"], "MB"),
        Figure(section, "listing requests", requests["LIST"], ""),
        Figure(section, "reading requests", requests["GET"] + requests["HEAD"], ""),
    ]


def measure_status(scale: Scale) -> list[Figure]:
    """`reinforce status` of a finished dataset, and of a job that runs, in an object store."""
    content = make_content(scale.shards, scale.seconds)
    content = replace(content, objects={**content.objects, **running_job(scale.shards, scale.workers)})
    with serve(content) as address:
        job = run_child(["job", "s3://bucket/data"], environment(address))
        job_requests = counts(address)
        found = run_child(["status", "s3://bucket/data"], environment(address))
        requests = counts(address) - job_requests
    assert (found["shards"], job["workers"]) == (scale.shards, scale.workers), (found, job)
    section = f"status of {scale.shards:,} shards x 8 layers in S3, {scale.seconds:g} s a request"
    return [
        Figure(section, "time", found["seconds"], "s", 40.0, "at most"),
        Figure(section, "CPU", found["cpu"], "s"),
        Figure(section, "listing requests", requests["LIST"], ""),
        Figure(section, "reading requests", requests["GET"] + requests["HEAD"], ""),
        Figure(section, f"time, of a running job with {scale.workers:,} workers", job["seconds"], "s", 2.0, "at most"),
        Figure(section, "requests, of a running job", sum(job_requests[kind] for kind in ("LIST", "GET", "HEAD")), ""),
    ]


def measure_validate(scale: Scale) -> list[Figure]:
    """`reinforce validate --quick`: the listing of a large dataset in an object store, and shards of a local one."""
    with serve(make_content(scale.shards, scale.seconds)) as address:
        listed = run_child(["validate", "s3://bucket/data", "1"], environment(address))
        requests = counts(address)
    memory = Path("/dev/shm")  # noqa: S108 - a folder of its own in it
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        write_shards(Path(folder, "data"), scale.local_files // 8)
        read = run_child(["validate", f"{folder}/data"], {})
    # All shards of the object store have the files of one, so the one that is read has those of another shard.
    assert (listed["read"], listed["kinds"], read["valid"]) == (1, ["misplaced"], True), (listed, read)
    section = f"validate --quick --sample 1 of {scale.shards:,} shards x 8 layers in S3, {scale.seconds:g} s a request"
    of_files = f"validate --quick of {read['shards']:,} local shards x 8 layers, one process"
    return [
        Figure(section, "time", listed["seconds"], "s", 60.0, "at most"),
        Figure(section, "CPU", listed["cpu"], "s"),
        Figure(section, "peak of memory", listed["MB"], "MB"),
        Figure(section, "listing requests", requests["LIST"], ""),
        Figure(section, "reading requests", requests["GET"] + requests["HEAD"], ""),
        Figure(of_files, "CPU per shard", read["cpu"] / read["shards"] * 1000, "ms", 2.5, "at most"),
        Figure(of_files, "peak of memory", read["MB"], "MB", 300.0, "at most"),
    ]


def measure_local(scale: Scale) -> list[Figure]:
    """Planning on a local disk: nothing is finished, half is, and all is."""
    figures = []
    section = f"planning {scale.local_shards:,} local shards x {len(_LOCAL_LAYERS)} layers"
    memory = Path("/dev/shm")  # noqa: S108 - a folder of its own in it
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        last = f"{scale.local_shards - 1:07d}"
        names = shard_names([f"{folder}/source/{number:07d}.tar" for number in range(scale.local_shards)])
        config = Path(folder, "config.yaml")
        config.write_text(
            f"source: {folder}/source/{{{'0' * 7}..{last}}}.tar\noutput: {folder}/out\n"
            "teachers: {t: {model: ViT-B-32, pretrained: laion2b_s34b_b79k}}\n"
        )
        half = len(names) // 2
        for state, part in (("none", []), ("half", names[:half]), ("all", names[half:])):
            if part:
                _link(Path(folder, "out"), part)
                write_manifest(Path(folder, "out"), config)
            found = run_child(["plan", str(config)], {})
            figures += [
                Figure(section, f"time, {state} finished", found["seconds"], "s", 20.0, "at most"),
                Figure(section, f"CPU, {state} finished", found["cpu"], "s"),
                Figure(section, f"peak of memory, {state} finished", found["MB"], "MB", 800.0, "at most"),
            ]
    return figures


def _link(folder: Path, names: Sequence[str]) -> None:
    """Make layer files: links to a few files, because a million files take minutes. They have no index."""
    for layer in _LOCAL_LAYERS:
        (folder / layer).mkdir(parents=True, exist_ok=True)
        for start in range(0, len(names), 30_000):  # file systems bound the links of a file
            target = folder / layer / f"{names[start]}.parquet"
            target.write_bytes(bytes(1000))
            for name in names[start + 1 : start + 30_000]:
                os.link(target, folder / layer / f"{name}.parquet")


def measure_driver(scale: Scale) -> list[Figure]:
    """The driver on a simulated cluster."""
    return driver_figures(scale.workers, scale.watch_seconds)


def measure_secrets(scale: Scale) -> list[Figure]:
    """Removing secrets from events of a run with presigned URLs."""
    urls = [
        f"https://bucket.s3.amazonaws.com/{number:08d}.tar?X-Amz-Credential=AKIA%2F20261126%2Fus-east-1"
        f"&X-Amz-Signature={number * 7919:064x}&X-Amz-Security-Token=IQoJb3JpZ2luX2VjE{number:040x}%3D"
        for number in range(scale.urls)
    ]
    redact = Redactor({"source": urls})
    event = json.dumps({"event": "shard", "shard": "00000123-abcdef0123", "layers": ["embeddings/t/images"] * 8})
    start, rounds = time.process_time(), 200
    for _ in range(rounds):
        redact(event)
    milliseconds = (time.process_time() - start) / rounds * 1000
    return [Figure(f"{scale.urls:,} presigned URLs in `source`", "CPU per event to remove secrets", milliseconds, "ms")]


SECTIONS: dict[str, Callable[[Scale], list[Figure]]] = {
    "resume": measure_resume,
    "start": measure_start,
    "status": measure_status,
    "validate": measure_validate,
    "local": measure_local,
    "driver": measure_driver,
    "secrets": measure_secrets,
}


def run_child(arguments: Sequence[str], variables: Mapping[str, str]) -> dict[str, Any]:
    """What ``benchmarks.scale.child`` measures in a process of its own."""
    done = subprocess.run(  # noqa: S603 - this program
        [sys.executable, "-m", "benchmarks.scale.child", *arguments],
        env={**os.environ, **variables},
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the measurement failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small numbers, to test the benchmark; prints only")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="measure this part and print it")
    parser.add_argument("--keep", action="store_true", help="with --only, replace the part in the stored results")
    parser.add_argument("--page", action="store_true", help="only write the page from the stored figures")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    given = make_parser().parse_args(arguments)
    if given.page:
        update_page(PAGE, page.RESULTS, page.render_page)
        return
    figures = []
    for name in given.only or SECTIONS:
        figures += SECTIONS[name](QUICK if given.quick else Scale())
    Console().print(make_table(figures))
    if not given.quick and (given.keep or not given.only):
        if given.only:
            page.replace_figures(figures)
        else:
            write_results(page.RESULTS, PACKAGES, {"figures": [asdict(figure) for figure in figures]})
        update_page(PAGE, page.RESULTS, page.render_page)


if __name__ == "__main__":
    main()
