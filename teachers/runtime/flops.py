"""Floating-point operations of models, the peak rates of cards, and forward passes without compiled code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from teachers.protocols import Precision

_eager: ContextVar[bool] = ContextVar("eager", default=False)


@contextmanager
def eager() -> Iterator[None]:
    """Context without compiled code.

    A mode that sees operations, such as torch's counter of them, would not see those of compiled code. And torch never
    again runs compiled code of a function that was called inside of such a mode.
    """
    set_stance = getattr(torch.compiler, "set_stance", None)  # since torch 2.6
    token = _eager.set(True)
    try:
        with nullcontext() if set_stance is None else set_stance("force_eager"):
            yield
    finally:
        _eager.reset(token)


def is_eager() -> bool:
    """Whether this thread is inside of ``eager``."""
    return _eager.get()


# Peak rates are those that the makers of the cards state: dense matrix products without sparsity. Data sheets of NVIDIA
# state them with sparsity, twice as high. Compared with copies of these in November 2026: B200 and GB200
# (https://glennklockwood.com/garden/processors/B200, and NVIDIA's table in
# https://zdszero.github.io/Computer/Artificial_Intelligence/Hardware.html), H100 SXM and PCIe
# (https://archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html), H200
# (https://itkb.uw.cz/2026/06/nvidia-h200-vs-b300-precisions-cores.html), A100
# (https://glennklockwood.com/garden/processors/A100), A40 and L4 (https://hmc-tech.com/gpu/nvidia-l4-vs-nvidia-a40, 3 %
# higher clocks), L40S, L40, A30, H800 and GH200 (hardware_dict.py of https://github.com/feifeibear/LLMRoofline). Others
# were not compared. GeForce cards have half the rate with sums in fp32.

_TERA = 1e12
#: TFLOP/s in bf16 and fp16 with sums in fp32, in TF32, and in fp32, by words that torch's name of the card contains, or
#: others behind a slash. None where the card has no such unit. The first row that matches is used.
_CARDS: tuple[tuple[str, float | None, float | None, float], ...] = (
    ("GB200", 2500, 1250, 80),
    ("B200", 2250, 1100, 75),
    ("H200 NVL/H100 NVL", 835.5, 417.5, 60),
    ("H100 PCIe", 756, 378, 51),
    ("GH200/H200/H100/H800", 989, 494.5, 67),
    ("A100/A800", 312, 156, 19.5),
    ("A30", 165, 82, 10.3),
    ("A40", 149.7, 74.8, 37.4),
    ("A10G", 70, 35, 31.5),
    ("A10", 125, 62.5, 31.2),
    ("RTX A6000", 154.8, 77.4, 38.7),
    ("RTX 6000 Ada", 364.2, 182.1, 91.1),
    ("L40S", 362, 183, 91.6),
    ("L40", 181, 90.5, 90.5),
    ("L4", 121, 60, 30.3),
    ("RTX 5090", 209.5, 104.8, 104.8),
    ("RTX 4090", 165.2, 82.6, 82.6),
    ("RTX 3090", 71, 35.6, 35.6),
    ("V100 PCIE", 112, None, 14),
    ("V100", 125, None, 15.7),
    ("T4", 65, None, 8.1),
)
_WITHOUT_BF16 = ("V100", "T4")
#: Cards whose products in fp8 are twice as fast as in bf16.
_WITH_FP8 = ("GB200", "B200", "GH200", "H200", "H100", "RTX 6000 Ada", "L40S", "L40", "L4")


def peak_flops(card: str, precision: Precision) -> float | None:
    """FLOP/s that a card, by torch's name of it, can reach at most in a precision; None if that is not known."""
    words = card.upper().replace("-", " ").split()
    for names, half, tf32, fp32 in _CARDS:
        if any({*name.upper().split()} <= {*words} for name in names.split("/")):
            if precision == "bf16" and names.startswith(_WITHOUT_BF16):
                return None
            fp8 = 2 * half if half and names.startswith(_WITH_FP8) else None
            rate = {"fp32": fp32, "tf32": tf32, "bf16": half, "fp16": half, "fp8": fp8}[precision]
            return None if rate is None else rate * _TERA
    return None


def _convolution_backward(
    gradient: list[int], inputs: list[int], weight: list[int], *others: Any, out_shape: Any = None
) -> int:
    """As many as the convolution's, for each of the gradients of inputs and weights. torch ignores groups in it, and so
    counts a depthwise convolution as if each channel had all others as inputs."""
    transposed, needed = others[4], others[7]
    return int(conv_flop_count(inputs, weight, gradient, transposed=transposed)) * sum(needed[:2])


_MAPPING = {
    torch.ops.aten.convolution_backward: _convolution_backward,
    # torch does not count it in place, as the loss of large batches adds up gradients
    torch.ops.aten.addmm_: lambda total, first, second, **_: 2 * first[0] * first[1] * second[1],
}


def count_flops(work: Callable[[], Any]) -> int:
    """FLOPs of a function; 0 if they cannot be counted."""
    try:
        return counted_flops(work)
    except Exception:  # the counter does not support every operation, and a run does not need its result
        return 0


def counted_flops(work: Callable[[], Any]) -> int:
    """FLOPs of matrix products and convolutions in a function; a multiplication and an addition count as two.

    Raises what the function raises, and for operations that cannot be counted.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its operation is unknown to the counter
    try:
        counter = FlopCounterMode(display=False, custom_mapping=_MAPPING)
        # Attention as products, since the fused kernel of CPUs is unknown, too.
        with sdpa_kernel(SDPBackend.MATH), eager(), counter:
            work()
        return int(counter.get_total_flops())
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
