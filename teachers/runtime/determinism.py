"""Deterministic CUDA: torch's flags and the environment, set in one place before CUDA starts.

A process calls ``set_flags`` before it loads a model. What is then settled on CUDA:

- fp32 products and convolutions are IEEE. TF32 is used where a model's precision is ``tf32``, and nowhere else.
- Sums of bf16 and fp16 products are accumulated in fp32.
- Attention uses torch's flash kernel, else its memory-efficient one, else plain products. cuDNN's kernels are not
  deterministic, and they build a plan for each new shape, which takes tens of milliseconds.
- With ``deterministic``, kernels are deterministic: cuBLAS with a fixed workspace, cuDNN's
  deterministic algorithms without a search for the fastest, and torch's deterministic operations.

The legacy names of the TF32 flags are used: torch 2.4 has no others, later versions keep both in step, and reading the
legacy ones after the new ones were set raises in some versions, in torch.compile too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from contextvars import ContextVar

import torch

_LOG = logging.getLogger(__name__)
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_required: ContextVar[bool] = ContextVar("required", default=False)
_NO_KERNEL = re.compile(r"(\S+) does not have a deterministic implementation")
#: cuDNN has no algorithm that is left by data type, memory layout, workspace and determinism. torch 2.4 to 2.13 add GET
#: or FIND was; its lack of memory for a workspace is hidden in the same message.
_NO_ENGINE = re.compile(r"unable to find (an engine to execute|a valid cuDNN algorithm)", re.IGNORECASE)


def environment() -> dict[str, str]:
    """Environment variables with which a process that uses CUDA starts. Variables that are set stay."""
    return {_WORKSPACE: os.environ.get(_WORKSPACE, ":4096:8")}


def set_flags(device: str, deterministic: bool = True, strict: bool = False) -> None:
    """Set the flags of this process for models on a device (``auto``, ``cpu``, ``cuda``, ``cuda:0``).

    Call it before CUDA starts. With ``strict``, an operation without a deterministic kernel raises RuntimeError
    instead of a warning. Training needs it: the backward passes of attention are deterministic only then. Results on
    CPUs do not change.
    """
    if deterministic and _WORKSPACE not in os.environ and torch.cuda.is_initialized():
        _LOG.warning("CUDA has started without %s in the environment: results may differ between runs", _WORKSPACE)
    os.environ.update(environment())
    allow_tf32(False)
    products = torch.backends.cuda.matmul
    products.allow_bf16_reduced_precision_reduction = False
    products.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    for enable in ("flash", "mem_efficient", "math"):
        getattr(torch.backends.cuda, f"enable_{enable}_sdp")(True)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    # The flag also changes operations on CPUs, which are deterministic without it.
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        torch.use_deterministic_algorithms(deterministic, warn_only=not strict)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextlib.contextmanager
def strict_flags(device: str, deterministic: bool = True) -> Iterator[None]:
    """``set_flags`` with ``strict``. Afterwards nothing raises that did not before, such as in a notebook."""
    before = _mode()
    set_flags(device, deterministic, strict=True)
    try:
        yield
    finally:
        _set_mode(*before)


def _mode() -> tuple[bool, bool]:
    """Whether torch's operations must be deterministic, and whether others only warn."""
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _set_mode(deterministic: bool, warn_only: bool) -> None:
    if _mode() != (deterministic, warn_only):  # the call takes a second in its process: it imports the compiler
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def allow_tf32(allowed: bool) -> None:
    """Let fp32 products and convolutions on CUDA round their inputs to TF32, or not."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """TF32 for the fp32 products and convolutions that are queued inside.

    The flag belongs to the process, as all flags of this module: one thread at a time may launch models.
    """
    allow_tf32(True)
    try:
        yield
    finally:
        allow_tf32(False)


@contextlib.contextmanager
def inference() -> Iterator[None]:
    """Forward passes of any model in a process with ``strict`` flags: without a deterministic kernel they only warn."""
    before = _mode()
    if before[0]:
        _set_mode(True, True)
    try:
        yield
    finally:
        _set_mode(*before)


@contextlib.contextmanager
def unique_indices() -> Iterator[None]:
    """Work that writes to each index once, which is deterministic as it is.

    The flag would have CUDA sort the indices of each copy: several kernels in each layer of a decoding step.
    """
    before, token = _mode(), _required.set(must_be_deterministic())
    _set_mode(False, False)
    try:
        yield
    finally:
        _set_mode(*before)
        _required.reset(token)


def must_be_deterministic() -> bool:
    """Whether results must be equal each time, also inside of ``unique_indices``, which lifts torch's flag."""
    return _required.get() or _mode()[0]


def operation_without_kernel(error: BaseException) -> str | None:
    """The operation, if ``error`` says that CUDA has no deterministic kernel for it."""
    found = _NO_KERNEL.search(str(error))
    return found[1] if found else None


def is_without_engine(error: BaseException) -> bool:
    """Whether ``error`` says that cuDNN has no algorithm for a convolution, or no memory for one."""
    return isinstance(error, RuntimeError) and _NO_ENGINE.search(str(error)) is not None


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch inside the block and restore its random state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
