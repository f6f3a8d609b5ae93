"""Errors of devices without free memory."""

from __future__ import annotations

import weakref

import pytest
import torch

from reinforce.engine.inference.out_of_memory import OutOfMemory, attempt, is_out_of_memory, memory_hint
from reinforce.engine.messages.results import raising_layer_failure


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported asynchronously"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_errors_of_memory_are_recognised_also_as_the_cause_of_another(error: Exception) -> None:
    assert is_out_of_memory(error)
    other = ValueError("our_lab: encoding failed")
    other.__cause__ = error
    assert is_out_of_memory(other)
    assert memory_hint(other).startswith(". The models of the config do not fit")


def test_other_errors_are_not_of_memory() -> None:
    for error in (RuntimeError("device-side assert triggered"), ValueError("CUDA out of memory"), MemoryError()):
        assert not is_out_of_memory(error)
        assert memory_hint(error) == ""
        with pytest.raises(type(error)):
            attempt(lambda error=error: _raise(error))  # type: ignore[misc]


def _raise(error: Exception) -> None:
    raise error


def test_an_attempt_that_runs_out_of_memory_releases_what_its_functions_held() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def encode() -> torch.Tensor:
        large = torch.zeros(1000)
        held.append(weakref.ref(large))
        return large @ torch.empty(2**60)  # the CPU's allocator raises

    def run() -> torch.Tensor:
        with raising_layer_failure("embeddings/red/images"):
            return encode()

    result = attempt(run)
    assert isinstance(result, OutOfMemory)
    assert result.layer == "embeddings/red/images"
    assert "DefaultCPUAllocator" in result.text
    assert held[0]() is None
    assert attempt(lambda: 3) == 3
