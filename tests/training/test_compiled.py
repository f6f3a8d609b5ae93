"""A compiled model whose gradients are reduced over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from reinforce.training.distributed.ranks import Ranks, wrap_ddp
from teachers.device.accelerator import Accelerator


class Wide(torch.nn.Module):
    """More parameters than the first two buckets of DistributedDataParallel hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(1500, 1500, bias=False) for _ in range(5))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            values = layer(values)
        return values


def test_a_compiled_model_is_split_into_graphs_where_gradients_are_reduced() -> None:
    """A model that is compiled before it is wrapped: torch splits what it compiles inside of the wrapper. So gradients
    are reduced during the backward pass, and the pass without gradients of `accumulate` is one whole graph."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, values = Wide(), torch.ones(2, 1500)
        model.compile(backend=backend)
        wrapped = wrap_ddp(model, Ranks(0, 2, Accelerator("cpu")))
        with torch.no_grad():
            model(values)
        assert len(graphs) == 1
        wrapped(values).sum().backward()
    finally:
        dist.destroy_process_group()
    assert len(graphs) > 2
    assert all(layer.weight.grad is not None for layer in model.layers)
