"""Layers whose weights no longer change, laid out once for the device and the arithmetic that they run in."""

from __future__ import annotations

import torch

from teachers.device import Accelerator


class FrozenLinear(torch.nn.Module):
    """``x @ weight.T + bias`` with weight [out, in] and bias [out].

    In a lower precision the weights are cast here, as autocast would at every call. On CPUs they are packed for
    oneDNN: its products of a few rows with a large matrix, which is what a decoding step is made of, run at twice the
    speed of the BLAS that PyTorch takes by default, and large products gain a quarter (AMD EPYC, AVX-512).
    ``packed=False`` leaves the layout to a compiler, which must see the weights.
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


class FrozenAttention(torch.nn.Module):
    """A ``torch.nn.MultiheadAttention`` whose keys and values come from one input, ``batch_first``, without dropout."""

    def __init__(self, attention: torch.nn.MultiheadAttention, accelerator: Accelerator) -> None:
        super().__init__()
        width, bias = attention.embed_dim, attention.in_proj_bias
        if attention.in_proj_weight is not None:
            query, *others = attention.in_proj_weight.split(width)
        else:  # where keys and values have another width
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
        """[B, n, width], [B, m, width of keys] and the same again -> [B, n, width]."""
        assert key is value
        assert not need_weights
        projected = (self.query(query), *self.key_value(key).chunk(2, dim=-1))
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in projected)
        x = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out(x.transpose(1, 2).flatten(2)), None


def freeze(module: torch.nn.Module, accelerator: Accelerator) -> None:
    """Put fixed layers in the place of a module's linear maps and attentions, at any depth."""
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
