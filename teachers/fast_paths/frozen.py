"""Inference layers with fixed weights, cast to the precision and packed for the device once."""

from __future__ import annotations

from functools import partial

import torch

from teachers.runtime.accelerator import Accelerator


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
    """A ``torch.nn.MultiheadAttention`` with ``batch_first``, without dropout, whose key and value are one input.

    Nothing is copied between the products and the attention. ``packed`` is that of ``FrozenLinear``; without it,
    queries, keys and values of self-attention are one product.
    """

    def __init__(self, attention: torch.nn.MultiheadAttention, accelerator: Accelerator, packed: bool = True) -> None:
        super().__init__()
        linear = partial(FrozenLinear, accelerator=accelerator, packed=packed)
        width, bias = attention.out_proj.weight.shape[1], attention.in_proj_bias
        whole = attention.in_proj_weight
        if whole is not None:
            query, others = whole[:width], whole[width:]
        else:  # keys and values have another width
            query, others = attention.q_proj_weight, torch.cat([attention.k_proj_weight, attention.v_proj_weight])
        self.heads = attention.num_heads
        self.whole = None if packed or whole is None else linear(whole, bias)
        self.query = linear(query, None if bias is None else bias[:width])
        self.key_value = linear(others, None if bias is None else bias[width:])
        self.out = linear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        need_weights: bool = False,
        attn_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        """query [B, n, width]; key and value the same [B, m, key width] -> ([B, n, width], None).

        ``attn_mask`` is [n, m], or [B * heads, n, m].
        """
        assert key is value
        assert not need_weights
        if self.whole is not None and query is key:
            projected = self.whole(query).chunk(3, dim=-1)
        else:
            projected = (self.query(query), *self.key_value(key).chunk(2, dim=-1))
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in projected)
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.heads))
        x = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out(x.transpose(1, 2).flatten(2)), None


def freeze(module: torch.nn.Module, accelerator: Accelerator, packed: bool = True) -> None:
    """Replace a module's linear layers and attentions by frozen ones, recursively and in place."""
    for name, child in module.named_children():
        if type(child) is torch.nn.Linear:
            setattr(module, name, FrozenLinear(child.weight, child.bias, accelerator, packed))
        elif type(child) is torch.nn.MultiheadAttention and child.batch_first:
            setattr(module, name, FrozenAttention(child, accelerator, packed))
        else:
            freeze(child, accelerator, packed)


def _packable(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
