"""Ray without the processes that no run needs; they take a CPU second at each start. ``python -m`` runs a command."""

from __future__ import annotations

import sys

from ray._private.node import Node

from reinforce.cli import main

#: Methods that start what scales clusters and what prints the output of workers.
NEEDLESS = ("start_monitor", "start_log_monitor")


def start_nothing(node: Node) -> None:
    """In place of these methods."""


def leave_out_needless() -> None:
    """In every Ray that this process starts from now on."""
    for name in NEEDLESS:
        setattr(Node, name, start_nothing)


if __name__ == "__main__":
    leave_out_needless()
    main(sys.argv[1:])
