"""Inference layers with fixed weights, cast to the precision and packed for the device once."""

from __future__ import annotations

import torch

from teachers.device.accelerator import Accelerator


class FrozenLinear(torch.nn.Module):
    """``x @ weight.T + bias`` with weight [out, in] and bias [out].

    Weights are cast to the precision here; autocast would cast them at every call. On CPUs they are packed for oneDNN.
    It multiplies a few rows by a large matrix, the main work of a decoding step, twice as fast as PyTorch's default
    BLAS, and large products a quarter faster (AMD EPYC, AVX-512). ``packed=False`` keeps plain weights, which
    ``torch.compile`` needs.
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
        """[..., in] -> [..., out] in the accelerator's precision."""
        x = x.to(self._dtype)
        if self._packed:
            result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return result
        return torch.nn.functional.linear(x, self.weight, self.bias)


class FrozenAttention(torch.nn.Module):
    """A ``torch.nn.MultiheadAttention`` with ``batch_first``, without dropout, whose key and value are one input."""

    def __init__(self, attention: torch.nn.MultiheadAttention, accelerator: Accelerator) -> None:
        super().__init__()
        width, bias = attention.out_proj.weight.shape[1], attention.in_proj_bias
        if attention.in_proj_weight is not None:
            query, *others = attention.in_proj_weight.split(width)
        else:  # keys and values have another width
            query, others = attention.q_proj_weight, [attention.k_proj_weight, attention.v_proj_weight]
        self.heads = attention.num_heads
        self.query = FrozenLinear(query, None if bias is None else bias[:width], accelerator)
        self.key_value = FrozenLinear(torch.cat(others), None if bias is None else bias[width:], accelerator)
        self.out = FrozenLinear(attention.out_proj.weight, attention.out_proj.bias, accelerator)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        need_weights: bool = False,
        attn_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        """query [B, n, width]; key and value the same [B, m, key width] -> ([B, n, width], None)."""
        assert key is value
        assert not need_weights
        projected = (self.query(query), *self.key_value(key).chunk(2, dim=-1))
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in projected)
        x = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out(x.transpose(1, 2).flatten(2)), None


def freeze(module: torch.nn.Module, accelerator: Accelerator) -> None:
    """Replace a module's linear layers and attentions by frozen ones, recursively and in place."""
    for name, child in module.named_children():
        if type(child) is torch.nn.Linear:
            setattr(module, name, FrozenLinear(child.weight, child.bias, accelerator))
        elif type(child) is torch.nn.MultiheadAttention and child.batch_first:
            setattr(module, name, FrozenAttention(child, accelerator))
        else:
            freeze(child, accelerator)


def _packable(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
