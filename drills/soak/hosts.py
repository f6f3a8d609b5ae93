"""Hosts on one machine: namespaces at one switch, each with its network, processes, name and /tmp.

Needs Linux, root, iproute2 and util-linux. No traffic leaves the namespaces. The name of a host resolves to 127.0.1.1
there, as on Debian.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
RAY_PORT = 6379
STORE_PORT = 9000
_TOOLS = ("ip", "tc", "unshare", "nsenter", "mount")
_START_SECONDS = 240
_RESTART_SECONDS = 10
_DISK_BYTES = 256 * 2**20  # of /tmp
_INIT = 'mount --bind "$1" /etc/hosts && mount --bind "$2" /tmp && hostname "$3" && exec sleep infinity'


def why_impossible() -> str:
    """Why this machine cannot have such hosts, '' if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "they need Linux and root"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"they need {', '.join(missing)} (the packages iproute2, util-linux and mount)"
    name = f"reinforce-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"`ip netns add` fails: {made.stderr.strip()}"
    _run("ip", "netns", "del", name)
    return ""


def has_netem(space: str) -> bool:
    """Whether the kernel can delay and lose packets by itself."""
    rule = ["qdisc", "replace", "dev", "lo", "root", "netem", "delay", "1ms"]
    return not subprocess.run(["tc", "-n", space, *rule], capture_output=True, check=False).returncode


def _start_cable(near: str, link: str, far: str) -> subprocess.Popen[bytes]:
    """Start a link between two namespaces, whose devices are there then."""
    command = [sys.executable, "-m", "drills.soak.cable", near, link, far, "eth0"]
    cable = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert cable.stdout is not None
    assert cable.stdout.readline() == b"ready\n"
    return cable


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    return []


def _command_of(pids: Sequence[int]) -> bytes:
    with contextlib.suppress(OSError):
        return b"".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids)
    return b""


class Process(subprocess.Popen[bytes]):
    """``nsenter``, whose child is a command on a host."""

    def signal(self, number: int) -> None:
        """Send a signal to the command."""
        for pid in _children(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


class Host:
    """A network namespace with a link ``eth0`` to the switch."""

    def __init__(self, prefix: str, name: str, number: int, folder: Path, cable: bool = False) -> None:
        self.name, self.space, self.address = name, f"{prefix}-{name}", f"10.77.0.{number}"
        self.link, self._switch = f"p{number}", f"{prefix}-switch"
        self.folder = folder / name
        self.tmp = self.folder / "tmp"
        self.tmp.mkdir(parents=True, exist_ok=True)
        _run("mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(self.tmp))
        _run("ip", "netns", "add", self.space)
        self._cable: subprocess.Popen[bytes] | None = None
        if cable:
            self._cable = _start_cable(self._switch, self.link, self.space)
        else:
            veth = ["type", "veth", "peer", "eth0", "netns", self.space]
            _run("ip", "-n", self._switch, "link", "add", self.link, *veth)
        _run("ip", "-n", self._switch, "link", "set", self.link, "master", "br0", "up")
        _run("ip", "-n", self.space, "address", "add", f"{self.address}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            _run("ip", "-n", self.space, "link", "set", link, "up")
        # It leads nowhere. Ray takes the address of this route for that of the host.
        _run("ip", "-n", self.space, "route", "add", "default", "via", "10.77.0.254")

    def boot(self, hosts: Sequence[Host]) -> None:
        """Start its first process. Of the ``hosts``, it has its own name as an address of the loopback interface."""
        others = "".join(f"{host.address} {host.name}\n" for host in hosts if host is not self)
        names = self.folder / "hosts"
        names.write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n{others}")
        unshare = ["unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", _INIT, "sh"]
        command = ["ip", "netns", "exec", self.space, *unshare, str(names), str(self.tmp), self.name]
        self._unshare = subprocess.Popen(command, start_new_session=True)
        deadline = time.monotonic() + _START_SECONDS
        while b"infinity" not in _command_of(children := _children(self._unshare.pid)):
            assert self._unshare.poll() is None, f"{self.name} does not start"
            assert time.monotonic() < deadline, f"{self.name} does not start"
            time.sleep(0.05)
        [self.init] = children

    def start(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Process:
        """Start a command on this host."""
        enter = ["nsenter", f"--target={self.init}", "--mount", "--uts", "--net", "--pid", f"--wd={ROOT}", "--"]
        with log.open("ab") as out:
            return Process([*enter, *command], env=dict(environment), start_new_session=True, stdout=out, stderr=out)

    def cut(self) -> None:
        """Take its link away from the switch: packets are lost without an error, in both directions."""
        _run("ip", "-n", self._switch, "link", "set", self.link, "nomaster")

    def join(self) -> None:
        _run("ip", "-n", self._switch, "link", "set", self.link, "master", "br0")

    def delay(self, milliseconds: int, loss: float) -> None:
        """Delay what it sends, and lose ``loss`` percent of it."""
        if self._cable is not None:
            assert self._cable.stdin is not None
            self._cable.stdin.write(f"{milliseconds} {loss}\n".encode())
            self._cable.stdin.flush()
        elif milliseconds:
            rule = ["root", "netem", "delay", f"{milliseconds}ms", "loss", f"{loss}%"]
            _run("tc", "-n", self.space, "qdisc", "replace", "dev", "eth0", *rule)
        else:
            undo = ["tc", "-n", self.space, "qdisc", "del", "dev", "eth0", "root"]
            subprocess.run(undo, capture_output=True, check=False)

    def reject(self, other: Host) -> None:
        """Answer what this host sends to another one with 'no route'."""
        _run("ip", "-n", self.space, "route", "add", "unreachable", f"{other.address}/32")

    def reset(self) -> None:
        """Undo what the methods above have done, and free its disk."""
        (self.tmp / "full").unlink(missing_ok=True)
        self.join()
        self.delay(0, 0)
        _run("ip", "-n", self.space, "route", "flush", "type", "unreachable")

    def shut_down(self) -> None:
        """Kill every process of this host, and remove its namespace."""
        with contextlib.suppress(ProcessLookupError, AttributeError):
            os.kill(self.init, signal.SIGKILL)
            self._unshare.wait(30)
        if self._cable is not None:
            self._cable.kill()
            self._cable.wait(30)
        for undo in (["ip", "netns", "del", self.space], ["umount", "--lazy", str(self.tmp)]):
            subprocess.run(undo, capture_output=True, check=False)


class Network:
    """A switch and hosts. A host can be added at any time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.prefix = folder, f"reinforce-{os.getpid()}"
        self.hosts: dict[str, Host] = {}
        self._added = 0
        self.cables: frozenset[str] = frozenset()  # hosts whose link is a process
        _run("ip", "netns", "add", f"{self.prefix}-switch")
        _run("ip", "-n", f"{self.prefix}-switch", "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", f"{self.prefix}-switch", "link", "set", "br0", "up")

    def add(self, *names: str) -> list[Host]:
        made = []
        for name in names:
            self._added += 1
            host = Host(self.prefix, name, self._added, self.folder, name in self.cables)
            self.hosts[name] = host
            made.append(host)
        for host in made:
            host.boot([*self.hosts.values()])
        return made

    def remove(self, host: Host) -> None:
        """Shut a host down."""
        host.shut_down()
        del self.hosts[host.name]

    def close(self) -> None:
        for host in self.hosts.values():
            with contextlib.suppress(subprocess.SubprocessError):
                host.shut_down()
        subprocess.run(["ip", "netns", "del", f"{self.prefix}-switch"], capture_output=True, check=False)


@contextlib.contextmanager
def network(folder: Path) -> Iterator[Network]:
    """A network without hosts; at the end every process on its hosts is killed, and its namespaces are removed."""
    made = Network(folder)
    try:
        yield made
    finally:
        made.close()


class RayHosts:
    """A Ray cluster on hosts of a network: a head, a driver, an object store, and ``workers`` with one core each."""

    def __init__(self, net: Network, environment: Mapping[str, str], workers: Sequence[str]) -> None:
        self.net, self.log = net, net.folder / "ray.log"
        if not has_netem(f"{net.prefix}-switch"):
            net.cables = frozenset(["driver", workers[-1]])
        self.head, self.driver, self.store, *self.workers = net.add("head", "driver", "store", *workers)
        self.endpoint = f"http://{self.store.address}:{STORE_PORT}"
        self.address = f"{self.head.address}:{RAY_PORT}"
        self.environment = {**environment, "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
        self.environment |= {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.raylets: dict[str, Process] = {}
        self._restarted = 0.0

    def start(self) -> None:
        self.start_store()
        self.start_ray(self.head, 0, "--head", f"--port={RAY_PORT}", "--include-dashboard=false")
        for host, cores in ((self.driver, 0), *((worker, 1) for worker in self.workers)):
            self.start_ray(host, cores, f"--address={self.address}")
        self.wait_for_nodes(2 + len(self.workers))

    def start_store(self) -> None:
        self.store.start(
            [sys.executable, "-m", "drills.soak.object_store", "serve", str(STORE_PORT)], self.net.folder / "store.log",
            self.environment,
        )  # fmt: skip

    def start_ray(self, host: Host, cores: int, *options: str) -> None:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", *options]
        command += [f"--num-cpus={cores}", f"--node-ip-address={host.address}", "--object-store-memory=80000000"]
        self.raylets[host.name] = host.start(command, self.log, self.environment)

    def add_worker(self, name: str) -> None:
        """Let one more host join with one core."""
        [host] = self.net.add(name)
        self.start_ray(host, 1, f"--address={self.address}")

    def repair(self) -> None:
        """Undo faults, shut down hosts that joined late, and start Ray again where it has ended."""
        for host in [*self.net.hosts.values()]:
            if host not in (self.head, self.driver, self.store, *self.workers):
                self.net.remove(host)
                del self.raylets[host.name]
                continue
            host.reset()
        self.wait_for_nodes(2 + len(self.workers))

    def restart_ended(self) -> None:
        """Start Ray again on hosts where it has ended, at most every ten seconds, as systemd would."""
        if time.monotonic() - self._restarted < _RESTART_SECONDS:
            return
        self._restarted = time.monotonic()
        for host in (self.driver, *self.workers):
            if self.raylets[host.name].poll() is not None:
                self.start_ray(host, int(host is not self.driver), f"--address={self.address}")

    def wait_for_nodes(self, nodes: int) -> None:
        """Wait until so many nodes have joined."""
        code = (
            f"import ray; ray.init(address='{self.address}', log_to_driver=False); "
            "print('alive', sum(node['Alive'] for node in ray.nodes()))"
        )
        deadline, out = time.monotonic() + _START_SECONDS, self.net.folder / "probe.log"
        while True:
            self.restart_ended()
            out.unlink(missing_ok=True)
            self.driver.start([sys.executable, "-c", code], out, self.environment).wait(_START_SECONDS)
            if f"alive {nodes}" in out.read_text():
                return
            assert time.monotonic() < deadline, out.read_text()[-2000:] + self.log.read_text()[-2000:]
            time.sleep(1)

    def reinforce(self, log: Path, *arguments: str) -> Process:
        """Start a command of ``reinforce`` on the driver's host, with the cluster's address."""
        return self.driver.start(
            [sys.executable, "-m", "reinforce", *arguments], log, {**self.environment, "RAY_ADDRESS": self.address}
        )
