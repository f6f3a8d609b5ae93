"""The stand-in for CUDA raises and counts where CUDA raises, waits and copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from teachers.device.accelerator import Accelerator
from tests.helpers.stand_in_cuda import stand_in_cuda


def test_mixed_devices_raise_and_scalars_and_indices_of_the_cpu_do_not() -> None:
    with stand_in_cuda() as cuda:
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        for mix in (
            lambda: there + here,
            lambda: torch.cat([there, here]),
            lambda: torch.nn.functional.embedding(torch.tensor([0]), torch.ones(2, 2, device="cuda")),
            lambda: torch.nn.Linear(3, 2)(there),
            lambda: there.index_select(0, torch.tensor(1)),
            lambda: here[torch.zeros(1, dtype=torch.int64, device="cuda")],
        ):
            with pytest.raises(RuntimeError, match="same device"):
                mix()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        with cuda.counted() as counts:
            _ = there[torch.tensor([0, 2])] * torch.tensor(2.0) + 1
        assert [(copy.to_device, copy.blocking) for copy in counts.copies] == [(True, True)], "the indices"


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: (x > 0).nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.ones(3).to(x.device, non_blocking=True),  # from memory that is not pinned
    ],
)
def test_each_wait_of_the_host_is_counted_with_its_place_and_spoils_a_capture(wait) -> None:
    with stand_in_cuda() as cuda:
        tensor = torch.ones(3, device="cuda")
        with cuda.counted() as counts:
            wait(tensor)
        with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            wait(tensor)
    assert counts.synchronizations == 1, counts
    assert "tests/gpu/test_stand_in.py:" in next(iter(counts.waits))


def test_copies_of_pinned_memory_do_not_wait_and_operations_are_kernels_also_in_backward_passes() -> None:
    arena = np.zeros((4, 2), np.float32)
    with stand_in_cuda() as cuda:
        accelerator = Accelerator("cuda")
        accelerator.pin(arena)
        with cuda.counted() as counts:
            tensor = accelerator.put(np.ones(8, np.float32))
            parts = accelerator.put_parts([arena[:1], arena[2:]])
            assert parts.to("cpu", non_blocking=True).shape == (3, 2)
            torch.empty(8, pin_memory=True).copy_(tensor, non_blocking=True)
        copies = [(copy.to_device, copy.bytes) for copy in counts.copies]
        assert copies == [(True, 32), (True, 8), (True, 16), (False, 24), (False, 32)]
        assert counts.synchronizations == 0, counts
        layer = torch.nn.Linear(3, 2).to("cuda")
        inputs = torch.ones(4, 3, device="cuda")
        with cuda.counted() as counts, torch.inference_mode():
            layer(inputs).view(2, 4).transpose(0, 1)
            torch.nn.functional.scaled_dot_product_attention(*[inputs[None, None]] * 3)
        assert counts.by_name == {"addmm": 1, "scaled_dot_product_attention": 1}
        with cuda.counted() as counts:
            layer(inputs).sum().backward()
        assert {"addmm", "mm", "sum"} <= counts.by_name.keys()


def test_memory_is_bounded_allocations_are_counted_and_a_graph_uses_the_tensors_of_its_capture() -> None:
    with stand_in_cuda(memory=1000) as cuda:
        kept = torch.zeros(100, device="cuda")
        with cuda.counted() as counts:
            kept.add_(1).view(10, 10).mul_(2)
            assert not counts.allocations
            _ = kept + 1
            assert counts.allocations == 1
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(200, device="cuda")
        del _
        assert (cuda.allocated, torch.cuda.max_memory_allocated()) == (400, 800)
        inputs, total = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            doubled = inputs * 2
            total.add_(doubled.view(3))
        assert total.tolist() == [0, 0, 0]
        inputs.fill_(4)
        with cuda.counted() as counts:
            graph.replay()
            graph.replay()
        assert (counts.operations, counts.graph_launches) == (2, 2)
        assert (doubled.tolist(), total.tolist()) == ([8, 8, 8], [16, 16, 16])
