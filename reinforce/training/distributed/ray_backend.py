"""Additions to Ray Train's controller: the network interface of each rank, and the name of its actor."""

from __future__ import annotations

from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.v2._internal.execution.callback import ControllerCallback

from reinforce.training.distributed.network import use_interface_of


class GroupConfig(TorchConfig):
    """Ray's own config, with a backend that lets ranks on several hosts use the interfaces of their hosts."""

    @property
    def backend_cls(self) -> Any:
        return _Backend


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Start the process group; runs in the controller."""
        if len(set(worker_group.execute(ray.util.get_node_ip_address))) > 1:
            worker_group.execute(_use_interface)
        super().on_start(worker_group, backend_config)


def _use_interface() -> None:
    use_interface_of(ray.util.get_node_ip_address())


class ReportController(ControllerCallback):
    """Gives the ``mailbox`` the actor of the controller, for which Ray Train has no other function."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_controller_start(self, *_: Any) -> None:
        ray.get(self._mailbox.set_controller.remote(ray.get_runtime_context().current_actor))
