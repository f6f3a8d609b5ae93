"""Ray for tests: patient on a busy machine, and without the processes that no run needs. ``python -m`` runs a command.

Those processes take three CPU seconds at each start. Workers are forks of one process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from functools import partial
from typing import Any

import pytest
from ray._private import services
from ray._private.node import Node

from reinforce.cli import main
from tests.helpers import forks

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


def _with_forks(argument: str) -> str:
    option, address = f"--python_worker_command={sys.executable} ", os.environ.get(forks.ADDRESS)
    if address and argument.startswith(option):
        command = subprocess.list2cmdline(forks.worker_command(address))
        return argument.replace(option, f"--python_worker_command={command} ")
    return argument


def _start(agent: bool, command: list[str], *arguments: Any, **options: Any) -> Any:
    command = [_with_forks(argument if agent else _without_agent(argument)) for argument in command]
    return _start_process(command, *arguments, **options)


def prepare(patch: pytest.MonkeyPatch, agent: bool = False) -> None:
    """Change how this process starts Ray, until ``patch`` is undone. Only metrics need the ``agent``."""
    patch.setattr(services, "get_node", _wait_for_node)
    patch.setattr(services, "start_ray_process", partial(_start, agent))
    # They scale clusters, print the output of workers, and serve the dashboard, even where there is none.
    for needless in ("monitor", "log_monitor", "api_server"):
        patch.setattr(Node, f"start_{needless}", lambda *_, **__: None)


def run_command() -> None:
    """Run the command whose words are the arguments of this process."""
    prepare(pytest.MonkeyPatch())
    main(sys.argv[1:])


if __name__ == "__main__":
    run_command()
