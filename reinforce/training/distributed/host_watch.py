"""The hosts of a training run on Ray: which of them are lost, and when the training run ends for it.

Ray reports a silent host as dead after about a minute. Ray Train then restarts all ranks, and waits without a limit
where the hosts that are left cannot hold them. A host may be lost before its rank has started, so all hosts that were
alive when the training run began are watched.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from reinforce.cluster import has_autoscaler
from reinforce.processes.cores import capacity, describe_share

_INTERVAL = 2.0  # seconds between two questions to Ray
#: Seconds from the loss of a host until the training run ends, if the other hosts cannot hold its ranks by then.
_RETURN_SECONDS = 30.0


@dataclass(frozen=True)
class RankHost:
    """A host on which a rank runs or may run: Ray's id of the node, and the name and address of the host."""

    node: str
    name: str
    address: str

    @classmethod
    def here(cls) -> RankHost:
        node = ray.get_runtime_context().get_node_id()
        return cls(node, socket.gethostname(), ray.util.get_node_ip_address())


def live_hosts(nodes: Iterable[Mapping[str, Any]]) -> dict[str, RankHost]:
    """The hosts of those of Ray's ``nodes`` that are alive, by the ids of the nodes."""
    hosts = (
        RankHost(node["NodeID"], node["NodeManagerHostname"], node["NodeManagerAddress"])
        for node in nodes
        if node["Alive"]
    )
    return {host.node: host for host in hosts}


@dataclass(frozen=True)
class Cluster:
    """Ray's report: hosts whose nodes are dead, with their ranks, and the number of ranks that live nodes can hold.

    ``grows`` is whether an autoscaler may add nodes.
    """

    lost: Mapping[RankHost, tuple[int, ...]] = field(default_factory=dict)
    places: int = 0
    grows: bool = False


def find_lost(
    known: Iterable[RankHost], ranks: Mapping[int, RankHost], live: Collection[str], fit: bool
) -> dict[RankHost, tuple[int, ...]]:
    """Return the lost hosts with their ranks: those of ``ranks``, and others that were ``known`` if the ranks do not
    ``fit`` on the nodes in ``live``."""
    lost: dict[RankHost, tuple[int, ...]] = {}
    for rank, host in sorted(ranks.items()):
        if host.node not in live:
            lost[host] = (*lost.get(host, ()), rank)
    named = {host.node for host in lost}
    others = () if fit else (host for host in known if host.node not in live and host.node not in named)
    return lost | dict.fromkeys(others, ())


class LostHosts:
    """Decides from what Ray reports when a training run ends because of lost hosts; pure."""

    def __init__(self, ranks: int, cpus: float, gpus: float) -> None:
        self._ranks, self._share = ranks, describe_share(cpus, gpus)
        self._since: float | None = None
        self.cluster = Cluster()

    def update(self, cluster: Cluster, now: float) -> str | None:
        """Take what Ray reports; returns a line for the log when hosts have been lost since the last call."""
        before, self.cluster = self.cluster.lost, cluster
        fresh = {host: ranks for host, ranks in cluster.lost.items() if host not in before}
        if not cluster.lost:
            self._since = None
        elif self._since is None or fresh:
            self._since = now
        return f"{_names(fresh)} lost; the ranks restart once the other hosts can hold them" if fresh else None

    def error(self, now: float, failed: bool = False) -> str | None:
        """The error that ends the training run; None while it may go on. ``failed`` if Ray Train has given up."""
        if self._since is None:
            return None
        lost, fits = _names(self.cluster.lost), self.cluster.places >= self._ranks
        if fits:
            advice = "after train.retries restarts. Check the hosts"
        else:
            advice = (
                f"and the other hosts can hold {self.cluster.places} of {self._ranks} ranks with {self._share} "
                "each. Bring back what is lost, or set train.compute.ranks to fit"
            )
            failed = failed or (not self.cluster.grows and now - self._since >= _RETURN_SECONDS)
        again = "run the same command again, which resumes from the last checkpoint"
        return f"{lost} lost, {advice}; then {again}." if failed else None


def _names(lost: Mapping[RankHost, tuple[int, ...]]) -> str:
    """The hosts, with a verb."""
    names = []
    for host, ranks in lost.items():
        names.append(f"{host.name} ({', '.join([host.address, *(f'rank {rank}' for rank in ranks)])})")
    return f"host{'s' * (len(names) != 1)} {' and '.join(names)} {'was' if len(names) == 1 else 'were'}"


class HostWatch:
    """Asks Ray for its nodes every few seconds, in a thread, because the answer may take a minute."""

    def __init__(self, mailbox: Any, known: Mapping[str, RankHost], ranks: int, cpus: float, gpus: float) -> None:
        """``known`` are the hosts that were alive when the places on them were counted, by their nodes."""
        self._mailbox, self._ranks, self._cpus, self._gpus = mailbox, ranks, cpus, gpus
        self._known = {**known}
        self._hosts = LostHosts(ranks, cpus, gpus)
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._lines: list[str] = []
        threading.Thread(target=self._watch, daemon=True, name="host watch").start()

    def close(self) -> None:
        self._closed.set()

    @property
    def any_lost(self) -> bool:
        """Whether a host is lost on which ranks run, or ran last, or without which they have no place."""
        return bool(self._hosts.cluster.lost)

    def lines(self) -> list[str]:
        """Lines for the log that are new since the last call."""
        with self._lock:
            lines, self._lines = self._lines, []
        return lines

    def error(self, failed: bool = False) -> str | None:
        """The error that ends the training run, None while it may go on; with ``failed`` see ``LostHosts.error``."""
        if failed:
            with contextlib.suppress(RayError):
                self._look()
        with self._lock:
            return self._hosts.error(time.monotonic(), failed)

    def _watch(self) -> None:
        while not self._closed.wait(_INTERVAL):
            with contextlib.suppress(RayError, RuntimeError, OSError):  # Ray is being shut down
                self._look()

    def _look(self) -> None:
        ranks: dict[int, RankHost] = ray.get(self._mailbox.rank_hosts.remote())
        nodes = [node for node in ray.nodes() if node["Alive"]]
        live = live_hosts(nodes)
        self._known |= live
        places = capacity([node["Resources"] for node in nodes], self._cpus, self._gpus)
        lost = find_lost(self._known.values(), ranks, live, places >= self._ranks)
        found = Cluster(lost, places, bool(lost) and has_autoscaler())
        with self._lock:
            if line := self._hosts.update(found, time.monotonic()):
                self._lines.append(line)
