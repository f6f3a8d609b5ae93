"""The network interface through which ranks on several hosts connect: the one that has the address of the host.

Left alone, gloo uses the address that the name of its host resolves to. On many systems that is a loopback address,
such as Debian's 127.0.1.1, which no other host reaches. NCCL takes the first interface that is not a loopback one.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

#: Variables that choose an interface, with the prefix by which NCCL takes a name as a whole.
_VARIABLES = {"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "="}
_NCCL_FILES = ("/etc/nccl.conf", "~/.nccl.conf")
_OUTSIDE = ("198.51.100.1", 9)  # of a range for documentation; no packet is sent there


def use_interface_of(address: str | None) -> None:
    """Let gloo and NCCL use the interface with this address of the host, unless the user has chosen one.

    With None it is the address from which the host reaches MASTER_ADDR. Does nothing where no interface but the
    loopback has the address.
    """
    addresses = interface_addresses()
    found = address or own_address(os.environ.get("MASTER_ADDR", ""), addresses)
    os.environ.update(interface_variables(found, addresses, os.environ, _nccl_settings()))


def interface_variables(
    address: str | None, addresses: Sequence[tuple[str, str]], environment: Mapping[str, str], nccl: str = ""
) -> dict[str, str]:
    """The variables to set for a host with ``address``; ``addresses`` are (interface, address) of the host.

    ``nccl`` is the text of NCCL's own settings, which variables of the environment would override.
    """
    names = [name for name, own in addresses if own == address]
    if not names or _is_loopback(address):
        return {}
    chosen = {*environment, *re.findall(r"^\s*(\w+)\s*=", nccl, re.MULTILINE)}
    return {key: prefix + names[0] for key, prefix in _VARIABLES.items() if key not in chosen}


def own_address(master: str, addresses: Sequence[tuple[str, str]]) -> str | None:
    """The address of this host from which it reaches the host ``master``, a name or an address.

    On the master itself its name may resolve to the loopback interface: then that of the default route, or of the
    only other interface.
    """
    for target in ((master, 9), _OUTSIDE):
        if (found := _source_address(target)) and not _is_loopback(found):
            return found
    others = [(name, own) for name, own in addresses if not _is_loopback(own) and ":" not in own]
    return others[0][1] if len({name for name, _ in others}) == 1 else None


def interface_addresses() -> list[tuple[str, str]]:
    """(interface, address) of this host, IPv4 before IPv6."""
    return [
        (name, address.partition("%")[0])
        for version in (socket.AF_INET, socket.AF_INET6)
        for name, found in psutil.net_if_addrs().items()
        for family, address, *_ in found
        if family == version
    ]


def _source_address(target: tuple[str, int]) -> str | None:
    """The address from which this host sends to a target, None where there is no route. Sends nothing."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(*target, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _is_loopback(address: str | None) -> bool:
    try:
        return address is None or ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return True


def _nccl_settings() -> str:
    """The text of the files in which NCCL looks for its settings."""
    texts = []
    for name in (*_NCCL_FILES, os.environ.get("NCCL_CONF_FILE")):
        try:
            texts.append(Path(name).expanduser().read_text(errors="replace") if name else "")
        except (OSError, RuntimeError):
            continue
    return "\n".join(texts)
