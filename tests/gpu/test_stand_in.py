"""The stand-in for CUDA behaves and counts as CUDA does."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from teachers.device.accelerator import Accelerator
from tests.helpers.stand_in_cuda import CudaTensor, stand_in_cuda


def test_tensors_made_on_or_moved_to_the_device_report_it_and_compute_as_the_cpu() -> None:
    values = torch.randn(4, 3)
    with stand_in_cuda():
        made = [torch.zeros(2, device="cuda"), torch.tensor([1, 2], device="cuda:0"), values.to("cuda"), values.cuda()]
        made += [made[2].half(), made[2].to(made[0]), torch.nn.Linear(3, 2).to("cuda").weight, made[2][1:].T]
        assert all(type(tensor) is CudaTensor and tensor.is_cuda and tensor.device.type == "cuda" for tensor in made)
        assert made[2].to("cuda") is made[2]
        assert torch.equal((made[2] @ made[2].T).cpu(), values @ values.T)
        assert type(made[2].cpu()) is torch.Tensor
        with pytest.raises(TypeError, match="numpy"):
            made[0].numpy()
    assert not torch.zeros(1).is_cuda


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
        with cuda.counted() as counts:
            _ = there * torch.tensor(2.0) + 1
        assert not counts.copies
        with cuda.counted() as counts:
            _ = there[torch.tensor([0, 2])]
        assert [(copy.to_device, copy.blocking) for copy in counts.copies] == [(True, True)]


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
def test_each_wait_of_the_host_is_counted_with_its_place(wait) -> None:
    with stand_in_cuda() as cuda:
        tensor = torch.ones(3, device="cuda")
        with cuda.counted() as counts:
            wait(tensor)
    assert counts.synchronizations == 1, counts.describe()
    assert "tests/gpu/test_stand_in.py:" in next(iter(counts.waits))


def test_copies_from_and_to_pinned_memory_do_not_wait() -> None:
    arena = np.zeros((4, 2), np.float32)
    with stand_in_cuda() as cuda:
        accelerator = Accelerator("cuda")
        accelerator.pin(arena)
        with cuda.counted() as counts:
            tensor = accelerator.put(np.ones(8, np.float32))
            parts = accelerator.put_parts([arena[:1], arena[2:]])
            back = parts.to("cpu", non_blocking=True)
            torch.empty(8, pin_memory=True).copy_(tensor, non_blocking=True)
        assert back.shape == (3, 2)
    assert [(copy.to_device, copy.bytes) for copy in counts.copies] == [
        (True, 32),
        (True, 8),
        (True, 16),
        (False, 24),
        (False, 32),
    ]
    assert counts.synchronizations == 0, counts.describe()


def test_operations_are_counted_as_kernels_also_in_backward_passes_and_threads() -> None:
    with stand_in_cuda() as cuda:
        layer = torch.nn.Linear(3, 2).to("cuda")
        inputs = torch.ones(4, 3, device="cuda")
        with cuda.counted() as counts, torch.inference_mode():
            layer(inputs).view(2, 4).transpose(0, 1)
            torch.nn.functional.scaled_dot_product_attention(*[inputs[None, None]] * 3)
        assert counts.by_name == {"addmm": 1, "scaled_dot_product_attention": 1}
        with cuda.counted() as counts:
            layer(inputs).sum().backward()
        assert {"addmm", "mm", "sum"} <= counts.by_name.keys()
        assert type(layer.weight.grad) is CudaTensor
        with cuda.counted() as counts:
            thread = threading.Thread(target=lambda: torch.tensor([3.0], device="cuda"))
            thread.start()
            thread.join()
        assert counts.allocations == 1


def test_memory_is_bounded_and_allocations_can_be_made_to_fail() -> None:
    with stand_in_cuda(memory=1000) as cuda:
        kept = torch.zeros(100, device="cuda")
        with cuda.counted() as counts:
            kept.add_(1).view(10, 10).mul_(2)
            assert not counts.allocations
            _ = kept + 1
            assert (counts.allocations, counts.allocated_bytes) == (1, 400)
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(200, device="cuda")
        del _
        assert torch.cuda.mem_get_info() == (600, 1000)
        assert torch.cuda.max_memory_allocated() == 800
        with cuda.failing_allocations(lambda size: size > 16), pytest.raises(torch.OutOfMemoryError):
            torch.zeros(5, device="cuda")


def test_a_captured_graph_reads_and_writes_the_tensors_of_its_capture() -> None:
    with stand_in_cuda() as cuda:
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
        with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            total.sum().item()
        assert not torch.cuda.is_current_stream_capturing()


def test_autocast_of_the_device_computes_in_its_precision() -> None:
    with stand_in_cuda():
        accelerator = Accelerator("cuda", "bf16")
        layer = accelerator.prepare(torch.nn.Linear(3, 2))
        with accelerator.forward():
            assert layer(torch.ones(1, 3, device="cuda")).dtype is torch.bfloat16


def test_a_stream_that_does_not_wait_for_another_is_a_race() -> None:
    with stand_in_cuda():
        side, source = torch.cuda.Stream(), torch.ones(3, device="cuda")
        with torch.cuda.stream(side), pytest.raises(RuntimeError, match=r"uses what another stream writes"):
            source.add(1)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            made = source.add(1)
        with pytest.raises(RuntimeError, match=r"uses what another stream writes at tests/gpu/test_stand_in.py"):
            made.add(1)
        with pytest.raises(RuntimeError, match="writes what another stream reads"):
            source.zero_()
        torch.cuda.current_stream().wait_event(side.record_event())
        made.add(1)
        made.record_stream(torch.cuda.current_stream())
        source.zero_()
        with torch.cuda.stream(side):
            made = torch.ones(3, device="cuda")
            made.sum().item()  # the host waits
        made.add(1)


def test_memory_of_one_stream_used_on_another_needs_record_stream() -> None:
    def use_elsewhere(record: bool) -> None:
        with stand_in_cuda():
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                made = torch.ones(3, device="cuda")
            torch.cuda.current_stream().wait_stream(side)
            made.add(1)
            if record:
                made.record_stream(torch.cuda.current_stream())
            del made

    use_elsewhere(record=True)
    with pytest.raises(RuntimeError, match="freed without record_stream"):
        use_elsewhere(record=False)
