"""Faults of a network and of hosts, one at a time: ``python -m drills.soak.several_hosts`` (a part of ``make soak``).

A run, a training, a selection and a suite of evaluation sets, each on a Ray cluster whose head, driver, object store
and two workers are separate hosts (`hosts.py`). Each must end with the bytes of an undisturbed one, or with one line of
error.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from drills.soak.hosts import Host, Process, RayHosts, network, why_impossible
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.evaluation import colour_samples, write_classification
from tests.helpers.models.tiny_models import open_clip_model
from tests.helpers.reinforced import small_dataset
from tests.helpers.s3_proxy import s3_environment
from tests.helpers.students import student_folder

SHARDS = 24
SETS = ["mnist", "stl10", "cifar10", "vtab/svhn"]
_STORE = "10.77.0.3"  # the third host of a cluster
_LIMIT_SECONDS = 1800  # of a case; at 200 ms, a step of two ranks takes four seconds
_FILL_BYTES = 2**20


@dataclass(frozen=True)
class Work:
    """A command of ``reinforce``, whose ``output`` is below this prefix of the bucket.

    ``files`` selects those that are compared; a fault begins once ``started`` matches what is printed.
    """

    name: str
    files: str
    started: str = ""


WORKS = [
    Work("run", r"^(?!runs/|index/|dataset\.json).*\.parquet$", rf"\b[1-9]\d* of {SHARDS} shards"),
    Work("train", r"^student/.*\.safetensors$", r"step \d+ of"),
    Work("select", r"^views/.*\.parquet$"),
    Work("evaluate", r"scores\.json$"),
]


@dataclass(frozen=True)
class Fault:
    """What happens to a host, and after how many seconds it is undone; None if never.

    The commands of ``may_fail`` may end with an error; others must be complete.
    """

    name: str
    begin: Callable[[RayHosts, Host], object]
    seconds: float | None = None
    may_fail: tuple[str, ...] = ()


def _fill_disk(cluster: RayHosts, host: Host) -> None:
    """Fill /tmp of a host."""
    with open(host.tmp / "full", "wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(_FILL_BYTES))
            except OSError:
                return


FAULTS = [
    Fault("cut off for 30 s", lambda cluster, host: host.cut(), 30),
    Fault("cut off for good", lambda cluster, host: host.cut(), None, ("train", "evaluate")),
    Fault("200 ms and 2 % of packets lost", lambda cluster, host: host.delay(200, 2)),
    Fault(
        "no route to the object store",
        lambda cluster, host: host.reject(cluster.store),
        None,
        ("train", "select", "evaluate"),
    ),
    Fault("a full disk", _fill_disk, None, ("train", "select", "evaluate")),
    Fault("a host that joins late", lambda cluster, host: cluster.add_worker("late")),
]


class Bench:
    """A cluster, what the commands read, and what undisturbed ones write."""

    def __init__(self, cluster: RayHosts, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.model, self.whole_model = student_folder(folder / "student"), open_clip_model(folder / "model")
        self.whole: dict[str, dict[str, str]] = {}
        source = folder / "source"
        for shard in range(SHARDS):
            write_tar(source / f"{shard:02d}.tar", members_of(shard, 8))
        for key in SETS:
            write_classification(folder / "sets", key, colour_samples())
        self.dataset = small_dataset(folder / "made")
        for prefix, path in {"source": source, "dataset": self.dataset, "sets": folder / "sets"}.items():
            self.objects("put", str(path), prefix)

    def objects(self, *arguments: str) -> str:
        """Run a command of ``drills.soak.object_store`` on the host of the store -> its last line."""
        log = self.folder / "objects.log"
        log.unlink(missing_ok=True)
        environment = {**self.cluster.environment, "AWS_ENDPOINT_URL": self.cluster.endpoint}
        command = [sys.executable, "-m", "drills.soak.object_store", *arguments]
        assert self.cluster.store.start(command, log, environment).wait(300) == 0, log.read_text()[-2000:]
        return (log.read_text().splitlines() or [""])[-1]

    def command(self, work: Work, output: str) -> list[str]:
        """The words of a command that writes below ``output``."""
        if work.name == "evaluate":
            sets = ["--suite", "datacomp", "--data", "s3://bucket/sets", "--sets", ",".join(SETS), "--workers", "2"]
            results = ["--out", f"{self.folder}/{output}", "--json", f"{self.folder}/{output}.json"]
            return ["evaluate", self.whole_model, *sets, *results, "--device", "cpu"]
        config = getattr(self, f"_{work.name}")(f"s3://bucket/{output}")
        path = self.folder / f"{output}.yaml"
        path.write_text(yaml.safe_dump(config))
        return [work.name, str(path)]

    def _run(self, output: str) -> dict[str, Any]:
        teacher = {"class": "tests.helpers.models:ColorTeacher", "options": {"size": 16, "dim": 8, "delay": 2.0}}
        workers = {"batch": 16, "cpus": 1}
        return config_of("s3://bucket/source/*.tar", output, captioners={}, teachers={"red": teacher}, workers=workers)

    def _train(self, output: str) -> dict[str, Any]:
        compute = {"ranks": 2, "cpus": 1, "gpus": 0}
        data = {"datasets": "s3://bucket/dataset", "workers": 0, "streams": 2, "window": 16}
        train = {"steps": 200, "batch": 8, "checkpoints": {"every": 10, "keep": 2}, "log_every": 10, "compute": compute}
        student, optimizer = {"model": self.model}, {"lr": 0.002, "warmup": 5}
        return {
            "output": output,
            "seed": 3,
            "student": student,
            "data": data,
            "train": {**train, "optimizer": optimizer},
        }

    def _select(self, output: str) -> dict[str, Any]:
        self.objects("put", self.dataset, output.removeprefix("s3://bucket/"))
        rule = {"deduplicate": {"teacher": "red", "threshold": 0.9}}
        return {"dataset": output, "name": "some", "rules": [{"where": "caption IS NOT NULL"}, rule]}

    def written(self, work: Work, output: str) -> dict[str, str]:
        """The digests of what a command has written."""
        if work.name == "evaluate":
            return {"scores": Path(self.folder / f"{output}.json").read_text()}
        found: dict[str, str] = json.loads(self.objects("digests", output))
        return {name: digest for name, digest in found.items() if re.search(work.files, name)}

    def undisturbed(self, work: Work) -> None:
        status, log = self._finish(self.start(work, f"{work.name}-whole"), work, None)
        assert status == 0, log[-2000:]
        self.whole[work.name] = self.written(work, f"{work.name}-whole")
        assert self.whole[work.name]

    def start(self, work: Work, output: str) -> tuple[Process, Path]:
        log = self.folder / f"{output}.log"
        return self.cluster.reinforce(log, *self.command(work, output)), log

    def _finish(self, started: tuple[Process, Path], work: Work, fault: Fault | None) -> tuple[int | None, str]:
        """Wait for the end, with a fault -> the exit status, None if it does not end, and what was printed."""
        (process, log), deadline = started, time.monotonic() + _LIMIT_SECONDS
        host = self.cluster.workers[-1]
        undone = None
        try:
            while process.poll() is None and time.monotonic() < deadline:
                if fault is not None and re.search(work.started, log.read_text(errors="replace")):
                    fault.begin(self.cluster, host)
                    undone, fault = fault.seconds and time.monotonic() + fault.seconds, None
                if undone and time.monotonic() > undone:
                    host.reset()
                    undone = None
                self.cluster.restart_ended()
                time.sleep(0.2)
            return process.poll(), log.read_text(errors="replace")
        finally:
            process.signal(signal.SIGKILL)

    def problem(self, work: Work, fault: Fault, output: str) -> tuple[str, str]:
        """What is wrong with how a command ends under a fault ('' if nothing), and the last line that it printed."""
        status, log = self._finish(self.start(work, output), work, fault)
        lines = [line for line in log.splitlines() if line.strip()] or [""]
        errors = [line for line in lines if line.startswith("error: ")]
        if status is None:
            return f"it does not end in {_LIMIT_SECONDS} s", lines[-1]
        if "Traceback" in log or "unexpected" in "".join(errors):
            return "a traceback", lines[-1]
        if status != 0:
            expected = work.name in fault.may_fail and len(errors) == 1
            return "" if expected else f"status {status} with {len(errors)} errors", (errors or lines)[-1]
        made, whole = self.written(work, output), self.whole[work.name]
        return ("" if made == whole else f"other bytes: {[*made.items() ^ whole.items()][:3]}"), "equal"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression: cases whose names it matches")
    pattern = parser.parse_args().only
    if reason := why_impossible():
        print(f"several hosts: skipped, because {reason}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that hosts are shut down
    works = [work for work in WORKS if any(re.search(pattern, f"{work.name}: {fault.name}") for fault in FAULTS)]
    problems = tried = 0
    # Not in /tmp, which each host has for itself.
    with tempfile.TemporaryDirectory(prefix="reinforce-hosts-", dir="/var/tmp") as name:
        folder = Path(name)
        with network(folder / "network") as net:
            environment = {**os.environ, **s3_environment(f"http://{_STORE}:9000")}
            cluster = RayHosts(net, environment, ["first", "second"])
            cluster.start()
            bench = Bench(cluster, folder)
            for work in works:
                bench.undisturbed(work)
                for number, fault in enumerate(FAULTS):
                    case = f"{work.name}: {fault.name}"
                    if not re.search(pattern, case):
                        continue
                    begin = time.monotonic()
                    problem, last = bench.problem(work, fault, f"{work.name}-{number}")
                    seconds, tried = time.monotonic() - begin, tried + 1
                    result = "FAILED" if problem else "equal" if last == "equal" else "one error"
                    print(f"{case:<50} {result:<10} {seconds:6.1f} s", flush=True)
                    for line in (problem, last if last != "equal" else ""):
                        if line:
                            print(f"      {line[:400]}", flush=True)
                    problems += bool(problem)
                    cluster.repair()
    print(f"{tried} faults of hosts, {problems} problems")
    sys.exit(min(problems, 1))


if __name__ == "__main__":
    main()
