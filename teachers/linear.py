"""Linear maps whose weights no longer change, laid out once for the device and the arithmetic that they run in."""

from __future__ import annotations

import torch

from teachers.device import Accelerator


class FixedLinear(torch.nn.Module):
    """``x @ weight.T + bias`` with weight [out, in] and bias [out].

    In a lower precision the weights are cast here, as autocast would at every call. On CPUs they are packed for
    oneDNN: its product of a few rows with a large matrix, which is what a decoding step is made of, runs at twice the
    speed of the BLAS that PyTorch takes by default, and large products gain a quarter. ``packed=False`` leaves the
    layout to a compiler, which must see the weights.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, accelerator: Accelerator, packed: bool = True
    ) -> None:
        super().__init__()
        self._dtype = accelerator.dtype
        weight = weight.detach().to(self._dtype)
        self._packed = packed and _packable(weight)
        if self._packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().to(self._dtype), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out] in the accelerator's arithmetic."""
        x = x.to(self._dtype)
        if self._packed:
            result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return result
        return torch.nn.functional.linear(x, self.weight, self.bias)


def _packable(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
