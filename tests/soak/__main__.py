"""``python -m tests.soak --seconds 600``: runs that are harmed every few seconds and must end complete (``make soak``).

Rounds of one config, by turns into S3 and onto a disk, on a cluster of three nodes. Until the time is up, workers are
killed or stopped for a while, drivers killed or asked to stop and started again, nodes lost and added, and the S3 does
what it does on bad days. Each round must end with every shard finished and the bytes of an undisturbed run.
"""

from __future__ import annotations

import argparse
import logging
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

from tests.helpers.data import config_of, members_of, tree, write_tar
from tests.helpers.s3_proxy import Proxy, cut, refuse, slow
from tests.helpers.s3_runs import layers, puts_file

ROOT = Path(__file__).parents[2]
NODES = 3
CALM = (130, 0, 1, -signal.SIGKILL)  # how a driver may end: stopped, finished, told of a storage, killed
ASKED = (signal.SIGTERM, signal.SIGINT)
TOLD = " samples in "  # of a driver's last line


class Soak:
    def __init__(self, seed: int, seconds: float, shards: int, folder: Path) -> None:
        self.random, self.seconds, self.folder = random.Random(seed), seconds, folder
        self.chance = random.Random(seed)  # of the proxy's threads, so that the order of harms is the seed's
        self.shards, self.harms = shards, Counter[str]()
        self.starts = self.rounds = 0
        self.nodes: list[Any] = []
        self.driver: subprocess.Popen[bytes] | None = None
        self.output = ""

    def run(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # who asked for what
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        self.proxy = Proxy(0, server.get_host_and_port()[1])
        os.environ |= {"AWS_ENDPOINT_URL": self.proxy.url, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "k"}
        os.environ |= {"AWS_DEFAULT_REGION": "us-east-1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
        # On a busy machine workers have to get something done, and nodes time to start.
        os.environ |= {"RAY_worker_niceness": "0", "RAY_raylet_start_wait_time_s": "300"}
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
                print(f"{name}: complete and equal after {sum(self.harms.values())} harms", flush=True)
        finally:
            if self.driver is not None and self.driver.poll() is None:
                self.driver.kill()
            self.cluster.shutdown()

    def round(self, name: str, harmful: Callable[[], bool]) -> dict[str, bytes]:
        """Start drivers until one finishes, with a harm every few seconds while ``harmful``; the files it made."""
        remote = self.rounds % 2 == 1
        self.output = f"s3://bucket/{name}" if remote else str(self.folder / name)
        done, calm_since = 0, time.monotonic()
        while not self._finished():
            time.sleep(self.random.uniform(1, 4))
            found = self._committed(remote, name)
            if found > done:
                done, calm_since = found, time.monotonic()
                harms = [*self.PROCESSES]
            else:  # whose driver or node is killed before it can begin gets nothing done, however long
                harms = [*self.STORAGE, *self.WORKERS]
            assert time.monotonic() - calm_since < 300, f"{name} does not get on at {done} files: {self._log()}"
            if harmful():
                harm = self.random.choice(harms)
                harm(self)
                self.harms[harm.__name__.strip("_")] += 1
        return layers(self.s3, name) if remote else tree(self.folder / name)

    def _finished(self) -> bool:
        """Whether a driver has finished; starts another one where the last was ended."""
        status = None if self.driver is None else self.driver.poll()
        if self.driver is not None and status is None:
            return False
        if self.driver is not None:
            log = self._log()
            told = TOLD in log  # the work is done and Python is about to end, which a signal may do as well
            assert status in CALM or (told and -status in ASKED), f"a driver ended with {status}: {log}"
            assert "Traceback" not in log, log
            self.driver = None
            if status == 0:
                return True
        changes: dict[str, Any] = {"captioners": {}, "workers": {"batch": 16, "max": NODES}}
        # Whoever is killed at random is not to blame, however often.
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
        """How many files of layers there are by now."""
        if not remote:
            return len([*(self.folder / name).glob("embeddings/**/*.parquet")])
        self.s3.invalidate_cache()
        return len(self.s3.find(f"bucket/{name}/embeddings"))

    # -- harms

    def _workers(self) -> list[int]:
        """Processes of this cluster's workers."""
        listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
        rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
        ours = {os.getpid()}
        for pid, parent, _ in sorted(rows, key=lambda row: int(row[0])):
            if int(parent) in ours:
                ours.add(int(pid))
        return [int(pid) for pid, _, command in rows if int(pid) in ours and command.startswith("ray::Worker")]

    def _worker_killed(self) -> None:
        if workers := self._workers():
            os.kill(self.random.choice(workers), signal.SIGKILL)

    def _worker_stopped_for_a_while(self) -> None:
        for worker in self._workers()[:1]:
            os.kill(worker, signal.SIGSTOP)
            time.sleep(2)
            os.kill(worker, signal.SIGCONT)

    def _node_lost_and_another_added(self) -> None:
        node = self.nodes.pop(self.random.randrange(len(self.nodes)))
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.append(self.cluster.add_node(num_cpus=1))

    def _driver_killed(self) -> None:
        self._signal(signal.SIGKILL)

    def _driver_asked_to_stop(self) -> None:
        self._ask(signal.SIGTERM)

    def _driver_interrupted(self) -> None:
        self._ask(signal.SIGINT)

    def _ask(self, number: signal.Signals) -> None:
        """A program that still loads its modules ends as any Python does: one that has begun to speak ends well."""
        begun = time.monotonic()
        while not self._log() and time.monotonic() - begun < 60:
            time.sleep(0.2)
        self._signal(number)

    def _signal(self, number: signal.Signals) -> None:
        assert self.driver is not None
        self.driver.send_signal(number)
        try:
            self.driver.wait(60)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"a driver does not end at {number.name}: {self._log()}") from None

    def _s3_slow_down(self) -> None:
        self._for_a_while(self.proxy.harm(refuse(503, "SlowDown"), lambda _: self.chance.random() < 0.5))

    def _s3_internal_errors(self) -> None:
        self._for_a_while(self.proxy.harm(refuse(500, "InternalError"), puts_file))

    def _s3_connections_lost(self) -> None:
        self._for_a_while(self.proxy.harm(cut, lambda r: r.reads and self.chance.random() < 0.5))

    def _s3_slow(self) -> None:
        self._for_a_while(self.proxy.harm(slow(0.2), lambda r: r.reads))

    def _for_a_while(self, harm: Any) -> None:
        with harm:
            time.sleep(self.random.uniform(1, 3))

    WORKERS = (_worker_killed, _worker_killed, _worker_stopped_for_a_while)
    PROCESSES = (
        *WORKERS,
        _node_lost_and_another_added,
        _driver_killed,
        _driver_asked_to_stop,
        _driver_interrupted,
    )
    STORAGE = (_s3_slow_down, _s3_internal_errors, _s3_connections_lost, _s3_slow)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--shards", type=int, default=60, help="of a round")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="reinforce-soak-") as folder:
        soak = Soak(arguments.seed, arguments.seconds, arguments.shards, Path(folder))
        outcome = "stopped at a fault"
        try:
            soak.run()
            outcome = "each round complete and equal to an undisturbed run, byte for byte"
        finally:
            told = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(soak.harms.items()))
            print(
                f"{sum(soak.harms.values())} harms in {time.monotonic() - begin:.0f} s ({told}); "
                f"{soak.starts} starts of drivers, {soak.rounds} rounds of {soak.shards} shards; {outcome}"
            )


if __name__ == "__main__":
    main()
