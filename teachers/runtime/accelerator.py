"""A device: its memory, and the precision of forward passes on it, with one interface for CPU, CUDA (ROCm too), MPS."""

from __future__ import annotations

import gc
import logging
import re
import resource
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from typing import Literal, TypeAlias, TypeVar

import numpy as np
import torch

from teachers.protocols import Precision
from teachers.runtime.determinism import tf32

#: Messages of RuntimeErrors that mean the same as torch's OutOfMemoryError.
_MESSAGES = re.compile(
    r"(CUDA|HIP)( driver)? error: out of memory|(CUDA|HIP) out of memory|CUFFT_ALLOC_FAILED|"
    r"MPS backend out of memory|(CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_ALLOC_FAILED|DefaultCPUAllocator: "
)
GIB = 2**30
#: Share of a card's memory that the caches of one captioner may take, 1 / _PART.
_PART = 6


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, is that of a device without free memory."""
    return any(
        isinstance(one, torch.cuda.OutOfMemoryError) or (isinstance(one, RuntimeError) and _MESSAGES.search(str(one)))
        for one in _chain(error)
    )


def forget_frames(error: BaseException) -> None:
    """Let an error, and those that it was raised from, refer to nothing that the functions in it have held."""
    for one in _chain(error):
        traceback.clear_frames(one.__traceback__)


def release_cache(device: torch.device) -> None:
    """Return memory that nothing uses to the device."""
    gc.collect(1)  # cycles of the last batch; those of the whole process would take half a second
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def forget_peak(device: torch.device) -> None:
    """Return unused memory to the device, and count its peak from here on."""
    if device.type == "cuda":
        release_cache(device)
        torch.cuda.reset_peak_memory_stats(device)


def cache_bytes(device: torch.device, on_cpu: int) -> int:
    """Bytes for the caches of the captions that are decoded at once: ``on_cpu``, or a sixth of the memory of a card.

    It decides into how many parts a batch is cut, and the rounding of products may depend on that. So it is the
    card's whole memory in GiB that counts, not what is free of it: equal cards give equal bytes, whatever else is in
    their memory.
    """
    if device.type != "cuda":
        return on_cpu
    total = torch.cuda.get_device_properties(device).total_memory // GIB
    return max(1, total) * GIB // _PART


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it was raised from or while they were handled."""
    one: BaseException | None = error
    seen: set[int] = set()
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)


_LOG = logging.getLogger(__name__)
Module = TypeVar("Module", bound=torch.nn.Module)
TimeMark: TypeAlias = "float | torch.cuda.Event"

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Accelerator:
    """A device and the precision of forward passes on it.

    ``name`` is ``auto`` (``best_device``) or a torch device. Precision ``auto`` is bf16 on CUDA devices
    that have it, else fp32. Lower precisions use autocast, which works with any module and keeps norms and softmax in
    float32, as the models were trained; ``teachers.fast_paths.towers`` casts weights once where that gives
    the same bits.

    Raises ValueError if the device is unknown or not available, or does not have the precision.
    """

    def __init__(self, name: str = "auto", precision: Precision | Literal["auto"] = "fp32") -> None:
        if precision not in ("auto", *_DTYPES):
            raise ValueError(f"precision {precision!r} is unknown: use {', '.join(_DTYPES)}")
        if name == "auto":
            name = best_device()
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"device {name!r} is unknown: use auto, cpu, cuda, cuda:0 or mps") from error
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device {name!r} is not available: torch sees {torch.cuda.device_count()} CUDA devices")
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise ValueError(f"device {name!r} is not available: torch sees no GPU of Apple")
        self.device = device
        native = device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0))
        has_bf16 = bool(native)  # in the device itself; torch can emulate it, slowly
        if precision == "auto":
            precision = "bf16" if has_bf16 else "fp32"
        if precision == "bf16" and device.type == "cuda" and not has_bf16:
            raise ValueError(
                f"{torch.cuda.get_device_name(device)} has no bf16: set `precision` of this model to fp16 or fp32, or "
                "use accelerators that have it"
            )
        if device.type == "mps" and precision in ("bf16", "fp16") and not torch.amp.is_autocast_available("mps"):
            raise ValueError(f"precision {precision!r} needs torch 2.6 or newer on mps: set fp32, or update torch")
        self.precision: Precision = precision
        self.dtype = _DTYPES[precision]
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def of_float64(self, what: str) -> Accelerator:
        """The accelerator for ``what`` in float64: itself, or that of ``device_of_float64``."""
        device = device_of_float64(self.device, what)
        return self if device == self.device else Accelerator(device.type)

    def place(self, module: Module) -> Module:
        """Move a module to the device; on CUDA its convolutions become channels-last."""
        module.to(self.device)
        if self.device.type == "cuda":
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module

    def prepare(self, module: Module, cast: bool = False) -> Module:
        """Move a module to the device for inference: eval mode, no gradients.

        ``cast`` converts the weights to the precision, for language models: they were trained in it, and each of
        their decoding steps reads all weights for a few rows.
        """
        module.eval().requires_grad_(False)
        return module.to(self.device, self.dtype) if cast else self.place(module)

    def autocast(self) -> torch.autocast:
        """Context for forward passes in training: autocast where the precision has a data type of its own."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype if enabled else None, enabled=enabled)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Context for forward passes at inference: no autograd, autocast as in training, and TF32 where it is the
        precision."""
        rounding = tf32() if self.precision == "tf32" and self.device.type == "cuda" else nullcontext()
        with torch.inference_mode(), self.autocast(), rounding:
            yield

    def layout(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] in the memory layout that ``place`` gave the convolutions."""
        return pixels.contiguous(memory_format=torch.channels_last) if self.device.type == "cuda" else pixels

    def put(self, array: np.ndarray | torch.Tensor) -> torch.Tensor:
        """``upload`` to the device."""
        return upload(array, self.device)

    def put_parts(self, parts: Sequence[np.ndarray]) -> torch.Tensor:
        """Copy arrays to the device as one tensor, concatenated along the first dimension.

        On CUDA each is copied from where it is, asynchronously if ``pin`` has pinned that memory: it must not change
        before the device has finished. On CPU a single array is shared, not copied.
        """
        if self.device.type != "cuda":
            return self.put(parts[0] if len(parts) == 1 else np.concatenate(parts))
        tensors = [torch.from_numpy(part) for part in parts]
        shape = (sum(map(len, tensors)), *tensors[0].shape[1:])
        out = torch.empty(shape, dtype=tensors[0].dtype, device=self.device)
        for target, tensor in zip(out.split([len(tensor) for tensor in tensors]), tensors, strict=True):
            target.copy_(tensor, non_blocking=True)
        return out

    def pin(self, memory: np.ndarray) -> bool:
        """Page-lock memory, which must stay mapped, for asynchronous copies to CUDA. No-op on CPU.

        Returns whether it is pinned; copies from memory that is not are correct and slower.
        """
        if self.device.type != "cuda" or not memory.nbytes:
            return False
        with torch.cuda.device(self.device):
            if int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)) == 0:
                return True
            # CUDA keeps the error, and torch would raise it after the next kernel: "out of memory" in some model.
            with suppress(RuntimeError):
                torch.ones(1, device=self.device)
            return False

    @contextmanager
    def copy_stream(self) -> Iterator[None]:
        """Context in which ``put`` copies on a stream of its own; ``wait_for_copies`` ends the overlap."""
        with torch.cuda.stream(self._copies) if self._copies else nullcontext():
            yield

    def wait_for_copies(self, tensors: Iterable[torch.Tensor]) -> None:
        """Make the computation stream wait for tensors that were put inside ``copy_stream``."""
        if self._copies:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_stream(self._copies)
            for tensor in tensors:
                tensor.record_stream(stream)  # keeps their memory until the queued work is done

    def mark(self) -> TimeMark:
        """A point in time on the device's clock: when it starts what is queued next."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def has_passed(self, mark: TimeMark) -> bool:
        """Whether the device has done what was queued before a mark. Does not wait."""
        return isinstance(mark, float) or mark.query()

    def wait_until(self, mark: TimeMark) -> None:
        """Wait until the device has done what was queued before a mark. Other streams may be captured meanwhile, which
        ``synchronize`` would spoil."""
        if not isinstance(mark, float):
            mark.synchronize()

    def seconds_between(self, start: TimeMark, end: TimeMark) -> float:
        """Seconds between two marks that the device has already passed."""
        if isinstance(start, float) or isinstance(end, float):
            return end - start  # type: ignore[operator]
        return start.elapsed_time(end) / 1000

    def peak_memory(self) -> int:
        """Peak memory in bytes: of tensors on CUDA, else of the process."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def synchronize(self) -> None:
        """Wait until the device has finished all queued work. No-op on CPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def best_device() -> str:
    """What ``auto`` stands for: ``cuda`` if torch sees a card, else ``mps`` if it sees a GPU of Apple, else ``cpu``."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on MPS, which has nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


@cache
def device_of_float64(device: torch.device, what: str) -> torch.device:
    """Where ``what`` is computed in float64: on the device, or on the CPU, with one line in the log, for MPS."""
    if device.type != "mps":
        return device
    _LOG.warning("%s: on the CPU, because mps has no float64", what)
    return torch.device("cpu")


def upload(array: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to a device, on CUDA asynchronously through pinned memory. On CPU a writable array is shared, not copied.

    float64 becomes ``widest_float`` of the device.
    """
    if isinstance(array, np.ndarray):
        # torch has no read-only tensors, so read-only arrays of shared memory or Arrow are copied
        array = torch.from_numpy(array if array.flags.writeable else array.copy())
    if device.type == "cuda" and array.device.type == "cpu":
        array = array.pin_memory()  # the allocator does not reuse it before the copy is done
    dtype = widest_float(device) if array.dtype == torch.float64 else array.dtype
    return array.to(device, dtype, non_blocking=device.type == "cuda")


def put_into(target: torch.Tensor, array: np.ndarray) -> None:
    """Copy to the beginning of a tensor that stays where it is, on CUDA asynchronously through pinned memory."""
    source = torch.from_numpy(array)
    if target.device.type == "cuda":
        source = source.pin_memory()
    target[: len(source)].copy_(source, non_blocking=target.device.type == "cuda")


def download(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Copy to the host behind what is queued -> the copy, and the event with which it is complete; None: it is."""
    if tensor.device.type != "cuda":
        return tensor.to("cpu", copy=True), None
    host, copied = tensor.to("cpu", non_blocking=True), torch.cuda.Event()  # CUDA allocates pinned memory for it
    copied.record(torch.cuda.current_stream(tensor.device))
    return host, copied
