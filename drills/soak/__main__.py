"""Soak test: random faults every few seconds, for ``python -m drills.soak --seconds 600`` seconds (``make soak``).

Rounds of one config, alternating between S3 and a disk, on a cluster of three nodes. Until the time is up, workers are
killed or paused, decode processes are killed, drivers are killed or stopped and started again, nodes are lost and
added, and the S3 server fails.
Each round must end with every shard finished and with the files of an undisturbed run, byte for byte.
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from drills.soak.kills import DECODER, WORKER
from tests.helpers.data import config_of, members_of, tree, write_tar
from tests.helpers.s3_proxy import Fault, Proxy, Request, cut, refuse, s3_behind_proxy, s3_environment, slow
from tests.helpers.s3_runs import layers, writes_layer
from tests.helpers.waiting import processes_below

ROOT = Path(__file__).parents[2]
NODES = 3
#: Of a driver: stopped, stopped before or after its work, stopped before Ray is started, finished, a storage failed,
#: killed.
EXPECTED_STATUSES = (130, 143, -signal.SIGTERM, 0, 1, -signal.SIGKILL)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SUMMARY = " samples in "  # in a driver's last line


class Soak:
    def __init__(self, seed: int, seconds: float, shards: int, folder: Path, proxy: Proxy) -> None:
        self.random, self.seconds, self.folder, self.proxy = random.Random(seed), seconds, folder, proxy
        self.proxy_random = random.Random(seed)  # for the proxy's threads: the order of faults depends on the seed only
        self.shards, self.faults = shards, Counter[str]()
        self.starts = self.rounds = 0
        self.nodes: list[Any] = []
        self.driver: subprocess.Popen[bytes] | None = None
        self.output = ""

    def run(self) -> None:
        os.environ |= {**s3_environment(self.proxy.url), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
        os.environ |= {"RAY_worker_niceness": "0"}  # on a busy machine workers need CPU time
        import s3fs
        from ray.cluster_utils import Cluster

        self.s3 = s3fs.S3FileSystem()
        self.s3.mkdir("bucket")
        for shard in range(self.shards):
            path = write_tar(self.folder / f"{shard:04d}.tar", members_of(shard, 8))
            self.s3.put_file(str(path), f"bucket/source/{shard:04d}.tar")
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(NODES)]
            self.whole = self.round("undisturbed", lambda: False)
            assert len(self.whole) == 3 * self.shards + 1, f"{len(self.whole)} files"
            print(f"undisturbed: {self.shards} shards, {len(self.whole)} files", flush=True)
            end = time.monotonic() + self.seconds
            while time.monotonic() < end:
                self.rounds += 1
                name = f"round-{self.rounds}"
                made = self.round(name, lambda: time.monotonic() < end)
                assert made.keys() == self.whole.keys(), f"{name}: {sorted(made.keys() ^ self.whole.keys())[:5]}"
                assert made == self.whole, f"{name}: other bytes"
                print(f"{name}: complete and equal after {sum(self.faults.values())} faults", flush=True)
        finally:
            if self.driver is not None and self.driver.poll() is None:
                self.driver.kill()
            self.cluster.shutdown()

    def round(self, name: str, faulty: Callable[[], bool]) -> dict[str, bytes]:
        """Start drivers until one finishes, with a fault every few seconds while ``faulty()``; return the files."""
        remote = self.rounds % 2 == 1
        self.output = f"s3://bucket/{name}" if remote else str(self.folder / name)
        done, last_progress = 0, time.monotonic()
        while not self._finished():
            time.sleep(self.random.uniform(1, 4))
            found = self._committed(remote, name)
            if found > done:
                done, last_progress = found, time.monotonic()
                faults = PROCESSES
            else:  # a run whose driver or node is killed before it starts work would never make progress
                faults = [*STORAGE, *WORKERS]
            assert time.monotonic() - last_progress < 300, f"{name} makes no progress at {done} files: {self._log()}"
            if faulty():
                what, fault = self.random.choice(faults)
                fault(self)
                self.faults[what] += 1
        return layers(self.s3, name) if remote else tree(self.folder / name)

    def _finished(self) -> bool:
        """Whether a driver has finished. Starts another one if the last was killed or stopped."""
        status = None if self.driver is None else self.driver.poll()
        if self.driver is not None and status is None:
            return False
        if self.driver is not None:
            log = self._log()
            finished = SUMMARY in log  # a signal may then kill Python while it exits
            assert status in EXPECTED_STATUSES or (finished and -status in STOP_SIGNALS), (
                f"a driver ended with {status}: {log}"
            )
            assert "Traceback" not in log, log
            self.driver = None
            if status == 0:
                return True
        changes: dict[str, Any] = {"captioners": {}, "workers": {"batch": 16, "max": NODES}}
        # Random kills must not quarantine a shard, however many there are.
        changes["failures"] = {"attempts": 1000, "solo_attempts": 1000, "allowed_share": 0.0}
        changes["teachers"] = {"red": {"class": "tests.helpers.models:ColorTeacher", "options": {"delay": 0.5}}}
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(config_of("s3://bucket/source/*.tar", self.output, **changes)))
        command = [sys.executable, "-m", "reinforce", "run", str(path), "--address", self.cluster.address]
        with open(self.folder / "log", "wb") as log_file:
            self.driver = subprocess.Popen(command, cwd=ROOT, stdout=log_file, stderr=subprocess.STDOUT)
        self.starts += 1
        return False

    def _log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-3000:]

    def _committed(self, remote: bool, name: str) -> int:
        """Number of committed embedding files."""
        if not remote:
            return len([*(self.folder / name).glob("embeddings/**/*.parquet")])
        self.s3.invalidate_cache()
        return len(self.s3.find(f"bucket/{name}/embeddings"))

    # -- faults

    def _kill(self, command: str) -> None:
        if found := processes_below(os.getpid(), command):
            os.kill(self.random.choice(found), signal.SIGKILL)

    def _worker_paused(self) -> None:
        for worker in processes_below(os.getpid(), WORKER)[:1]:
            os.kill(worker, signal.SIGSTOP)
            time.sleep(2)
            os.kill(worker, signal.SIGCONT)

    def _node_lost_and_another_added(self) -> None:
        node = self.nodes.pop(self.random.randrange(len(self.nodes)))
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.append(self.cluster.add_node(num_cpus=1))

    def _stop_driver(self, number: signal.Signals) -> None:
        """Wait for the first output: a driver that still imports modules cannot stop cleanly."""
        start = time.monotonic()
        while not self._log() and time.monotonic() - start < 60:
            time.sleep(0.2)
        self._signal(number)

    def _signal(self, number: signal.Signals) -> None:
        self.driver.send_signal(number)
        try:
            self.driver.wait(60)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"a driver does not stop on {number.name}: {self._log()}") from None

    def _for_a_while(self, fault: Fault, when: Callable[[Request], bool], share: float = 1.0) -> None:
        """Inject a fault of the storage into a share of some requests."""
        with self.proxy.inject(fault, lambda request: when(request) and self.proxy_random.random() < share):
            time.sleep(self.random.uniform(1, 3))


WORKERS: list[tuple[str, Callable[[Soak], None]]] = [
    ("worker killed", lambda soak: soak._kill(WORKER)),
    ("worker killed", lambda soak: soak._kill(WORKER)),
    ("worker paused", Soak._worker_paused),
    ("decoder killed", lambda soak: soak._kill(DECODER)),
]
PROCESSES: list[tuple[str, Callable[[Soak], None]]] = [
    *WORKERS,
    ("node lost and another added", Soak._node_lost_and_another_added),
    ("driver killed", lambda soak: soak._signal(signal.SIGKILL)),
    ("driver asked to stop", lambda soak: soak._stop_driver(signal.SIGTERM)),
    ("driver interrupted", lambda soak: soak._stop_driver(signal.SIGINT)),
]
STORAGE: list[tuple[str, Callable[[Soak], None]]] = [
    ("S3 slow down", lambda soak: soak._for_a_while(refuse(503, "SlowDown"), lambda _: True, 0.5)),
    ("S3 internal errors", lambda soak: soak._for_a_while(refuse(500, "InternalError"), writes_layer)),
    ("S3 connections lost", lambda soak: soak._for_a_while(cut, lambda request: request.is_read, 0.5)),
    ("S3 slow", lambda soak: soak._for_a_while(slow(0.2), lambda request: request.is_read)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--shards", type=int, default=60, help="shards per round")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="reinforce-soak-") as folder, s3_behind_proxy() as proxy:
        soak = Soak(arguments.seed, arguments.seconds, arguments.shards, Path(folder), proxy)
        outcome = "a check failed"
        try:
            soak.run()
            outcome = "each round complete and equal to an undisturbed run, byte for byte"
        finally:
            counts = ", ".join(f"{count} {name}" for name, count in sorted(soak.faults.items()))
            print(
                f"{sum(soak.faults.values())} faults in {time.monotonic() - begin:.0f} s ({counts}); "
                f"{soak.starts} drivers started, {soak.rounds} rounds of {soak.shards} shards; {outcome}"
            )


if __name__ == "__main__":
    main()
