"""Ray for tests: patient on a busy machine, and without the processes that no run needs. ``python -m`` runs a command.

Those processes take two CPU seconds at each start.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from typing import Any

import pytest
from ray._private import services
from ray._private.node import Node

from reinforce.cli import main

_START_SECONDS = 600.0  # for Ray, which gives up after 30
_get_node, _start_process = services.get_node, services.start_ray_process

#: Instead of the agent for dashboards and metrics, a process writes the ports that the raylet waits for, where -1 means
#: none, and ends with the raylet.
_AGENT = re.compile(r"--dashboard_agent_command=.*--node-id=(\w+).*--session-dir=(\S+)", re.DOTALL)
_STAND_IN = (
    "for name in metrics_agent metrics_export dashboard_agent_listen; "
    "do printf %s -1 > {session}/$name; mv {session}/$name {session}/${{name}}_port_{node}; done; "
    "while kill -0 $PPID; do sleep 2; done"
)


def _wait_for_node(*arguments: Any, **options: Any) -> Any:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            return _get_node(*arguments, **options)
        except RuntimeError:  # the node does not answer yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _without_agent(argument: str) -> str:
    if (found := _AGENT.match(argument)) is None:
        return argument
    script = _STAND_IN.format(node=found[1], session=found[2])
    return "--dashboard_agent_command=" + subprocess.list2cmdline(["sh", "-c", script])


def _start_without_agent(command: list[str], *arguments: Any, **options: Any) -> Any:
    return _start_process([_without_agent(argument) for argument in command], *arguments, **options)


def prepare(patch: pytest.MonkeyPatch, agent: bool = False) -> None:
    """Change how this process starts Ray, until ``patch`` is undone. Only metrics need the ``agent``."""
    patch.setattr(services, "get_node", _wait_for_node)
    if not agent:
        patch.setattr(services, "start_ray_process", _start_without_agent)
    for needless in ("monitor", "log_monitor"):  # they scale clusters, and print the output of workers
        patch.setattr(Node, f"start_{needless}", lambda _: None)


def run_command() -> None:
    """Run the command whose words are the arguments of this process."""
    prepare(pytest.MonkeyPatch())
    main(sys.argv[1:])


if __name__ == "__main__":
    run_command()
