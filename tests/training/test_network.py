"""The interface through which ranks on several hosts connect, also where the name of a host is a loopback address."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reinforce.training.ranks import interface_addresses, interface_variables, own_address
from tests.helpers.data import free_port

ADDRESSES = [("lo", "127.0.0.1"), ("eth0", "10.0.0.5"), ("eth0", "10.0.0.6"), ("ib0", "10.1.0.5"), ("ib0", "fd00::5")]
BOTH = {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "=ib0"}


@pytest.mark.parametrize(
    ("address", "environment", "nccl", "set_to"),
    [
        ("10.1.0.5", {}, "", BOTH),
        ("fd00::5", {}, "", BOTH),
        ("10.0.0.6", {}, "", {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "=eth0"}),
        ("10.1.0.5", {"GLOO_SOCKET_IFNAME": "eth0"}, "", {"NCCL_SOCKET_IFNAME": "=ib0"}),
        ("10.1.0.5", {"NCCL_SOCKET_IFNAME": ""}, "", {"GLOO_SOCKET_IFNAME": "ib0"}),
        ("10.1.0.5", {}, "NCCL_DEBUG=WARN\n NCCL_SOCKET_IFNAME = eth0\n", {"GLOO_SOCKET_IFNAME": "ib0"}),
        ("10.1.0.5", {}, "# NCCL_SOCKET_IFNAME=eth0\n", BOTH),
        ("127.0.0.1", {}, "", {}),
        ("192.0.2.1", {}, "", {}),  # an address that the host is reached by, and does not have
        (None, {}, "", {}),
    ],
)
def test_gloo_and_nccl_use_the_interface_of_the_hosts_address_unless_the_user_chose_one(
    address: str | None, environment: dict[str, str], nccl: str, set_to: dict[str, str]
) -> None:
    assert interface_variables(address, ADDRESSES, environment, nccl) == set_to


def test_a_loopback_address_of_the_master_is_replaced_by_one_that_other_hosts_reach() -> None:
    addresses = interface_addresses()
    assert ("lo", "127.0.0.1") in addresses or sys.platform != "linux"
    others = [address for _, address in addresses if address != "127.0.0.1" and ":" not in address]
    if not others:
        pytest.skip("this machine has no address but loopback ones")
    assert own_address("127.0.0.1", addresses) in others
    assert own_address(others[0], addresses) == others[0]
    assert own_address("no.such.host.invalid", addresses) in others
    assert own_address("", [("lo", "127.0.0.1")]) in (None, *others), "no other interface"


#: One of two ranks that torchrun seems to have started on a host each -> the addresses of its connections to the other.
RANK = """
import json, os, socket, sys
import torch, torch.distributed as dist
from reinforce.training.config import Compute
from reinforce.training.ranks import join_ranks

def connections():
    files = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    sockets = {os.readlink(file) for file in files if os.path.lexists(file)}
    store = int(os.environ["MASTER_PORT"])
    for kind in ("tcp", "tcp6"):
        for line in open(f"/proc/self/net/{kind}").readlines()[1:]:
            fields = line.split()
            (address, port), (_, other) = fields[1].split(":"), fields[2].split(":")
            established = fields[3] == "01" and f"socket:[{fields[9]}]" in sockets
            if established and store not in (int(port, 16), int(other, 16)):
                yield socket.inet_ntoa(bytes.fromhex(address[-8:])[::-1])

with join_ranks(Compute(gpus=0)) as ranks:
    total = torch.tensor([1.0 + ranks.rank])
    dist.all_reduce(total)
    ranks.start_max(1)()
    print(json.dumps([socket.gethostbyname(socket.gethostname()), total.item(), sorted(set(connections()))]))
"""


def _renamed(command: list[str]) -> list[str] | None:
    """The command on a host named localhost; None if this user cannot have one."""
    if shutil.which("unshare") is None:
        return None
    unshare = ["unshare", "--uts", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    renamed = [*unshare, "sh", "-c", 'hostname localhost && exec "$@"', "sh"]
    if subprocess.run([*renamed, "true"], capture_output=True, check=False).returncode:
        return None
    return [*renamed, *command]


def test_ranks_on_hosts_whose_names_are_loopback_addresses_connect_by_their_other_ones(tmp_path: Path) -> None:
    addresses = interface_addresses()
    others = [address for _, address in addresses if not address.startswith("127.") and ":" not in address]
    command = _renamed([sys.executable, "-c", RANK])
    if command is None or not others:
        pytest.skip("needs `unshare --uts` and an address besides loopback ones")
    place = {"WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "localhost"}
    place |= {"MASTER_PORT": free_port(), "OMP_NUM_THREADS": 1}
    kept = {key: value for key, value in os.environ.items() if not key.endswith("_SOCKET_IFNAME")}
    ranks = []
    for rank in range(2):
        environment = {**kept, **{key: str(value) for key, value in {**place, "RANK": rank}.items()}}
        ranks.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    for rank in ranks:
        out, err = rank.communicate(timeout=300)
        assert rank.returncode == 0, err
        name, total, used = json.loads(out.splitlines()[-1])
        assert name.startswith("127."), "the name of the host is a loopback address"
        assert total == 3.0
        assert set(used) <= set(others), "no connection between the ranks uses the loopback interface"
        assert used
