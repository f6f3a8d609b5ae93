"""Ray for tests: patient on a busy machine, and without the processes that no run needs. ``python -m`` runs a command.

Those processes take a CPU second at each start.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest
from ray._private import services
from ray._private.node import Node

from reinforce.cli import main

_START_SECONDS = 240.0  # for Ray, which gives up after 30
_get_node = services.get_node


def _wait_for_node(*arguments: Any, **options: Any) -> Any:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            return _get_node(*arguments, **options)
        except RuntimeError:  # the node does not answer yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def prepare(patch: pytest.MonkeyPatch) -> None:
    """Change how this process starts Ray, until ``patch`` is undone."""
    patch.setattr(services, "get_node", _wait_for_node)
    for needless in ("monitor", "log_monitor"):  # they scale clusters, and print the output of workers
        patch.setattr(Node, f"start_{needless}", lambda _: None)


if __name__ == "__main__":
    prepare(pytest.MonkeyPatch())
    main(sys.argv[1:])
