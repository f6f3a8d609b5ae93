"""The blocks of CoCa's towers at one position, with attention over keys and values that are kept.

All but attention is done by the modules of open_clip's own blocks, so that activations, norms and layer scales are the
model's; their linear maps are those of ``Linear``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip.transformer as towers
import torch
from torch.nn.functional import scaled_dot_product_attention

Tensor = torch.Tensor
#: Weight [out, in] and bias -> the module that computes ``x @ weight.T + bias``.
Linear = Callable[[Tensor, Tensor | None], torch.nn.Module]


def check_block(block: Any) -> None:
    """Raise ValueError for a block whose words cannot be computed one by one."""
    attention = getattr(block, "attn", None)
    if not isinstance(attention, (torch.nn.MultiheadAttention, towers.Attention)):
        raise ValueError(f"blocks of type {type(block).__name__} are unknown")
    if getattr(attention, "logit_scale", None) is not None:
        raise ValueError("`scaled_cosine_attn` is not supported, as in open_clip's own forward pass, which fails")


class _Block(torch.nn.Module):
    """A residual block without what it attends to."""

    def __init__(self, block: Any, linear: Linear) -> None:
        super().__init__()
        attention, nothing = block.attn, torch.nn.Identity()
        self.heads = attention.num_heads
        self.norm = block.ln_1
        self.out = linear(attention.out_proj.weight, attention.out_proj.bias)
        # The norms and scales of a CustomResidualAttentionBlock; others do not have them.
        self.query_norm = getattr(attention, "ln_q", nothing)
        self.key_norm = getattr(attention, "ln_k", nothing)
        self.head_scale = getattr(attention, "head_scale", None)
        self.inner_norm = getattr(attention, "ln_inner", nothing)
        self.outer_norm = getattr(block, "ln_attn", nothing)
        self.scale = block.ls_1
        parts = (linear(m.weight, m.bias) if isinstance(m, torch.nn.Linear) else m for m in block.mlp)
        self.mlp = torch.nn.Sequential(block.ln_2, *parts, block.ls_2)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """[B, n, width] over [B, m, width] -> [B, n, width]; ``mask`` is bool, broadcast to [B, heads, n, m]."""
        query, keys, values = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, keys, values))
        x = scaled_dot_product_attention(self.query_norm(query), keys, values, attn_mask=mask)
        if self.head_scale is not None:
            x = x * self.head_scale
        return x.transpose(1, 2).flatten(2)

    def add(self, x: Tensor, attended: Tensor) -> Tensor:
        """The residual stream [rows, width] and what its words attended to [rows, width] -> [rows, width]."""
        x = x + self.scale(self.outer_norm(self.out(self.inner_norm(attended))))
        return x + self.mlp(x)


class SelfBlock(_Block):
    """Words look at the words before them."""

    def __init__(self, block: Any, linear: Linear) -> None:
        super().__init__(block, linear)
        self.project = linear(block.attn.in_proj_weight, block.attn.in_proj_bias)

    def forward(self, x: Tensor, past: Tensor, position: Tensor, reach: int, mask: Tensor | None) -> Tensor:
        """The newest words [rows, width] -> [rows, width].

        ``past`` [rows, 2, length, width] has the keys and values of all positions; those of the newest are put there
        at ``position``, int64 [1]. Words look at the first ``reach`` positions where ``mask`` lets them.
        """
        query, key, value = self.project(self.norm(x)).chunk(3, dim=-1)
        key = self.key_norm(key.unflatten(-1, (self.heads, -1))).flatten(1)
        past.index_copy_(2, position, torch.stack([key, value], dim=1)[:, :, None])
        keys, values = past[:, :, :reach].unbind(1)
        return self.add(x, self.attend(query[:, None], keys, values, mask).squeeze(1))


class CrossBlock(_Block):
    """Words look at the tokens of their image."""

    def __init__(self, block: Any, linear: Linear) -> None:
        super().__init__(block, linear)
        width, bias = block.attn.embed_dim, block.attn.in_proj_bias
        weights, biases = block.attn.in_proj_weight.split([width, 2 * width]), bias.split([width, 2 * width])
        self.project, self.project_image = (linear(*of) for of in zip(weights, biases, strict=True))
        self.image_norm = block.ln_1_kv

    def keys_values(self, images: Tensor) -> Tensor:
        """Image tokens [B, n, width] -> [B, n, 2 * width]."""
        projected: Tensor = self.project_image(self.image_norm(images))
        return projected

    def forward(self, x: Tensor, seen: Tensor, slots: Tensor, rows: int) -> Tensor:
        """The newest words [rows, width] -> [rows, width].

        ``seen`` is what ``keys_values`` gave. Word i is the ``slots[i]``-th of an array [B, rows] in which the words
        of an image stand side by side, so that they share its keys and values; a slot behind the array is a word of
        no image.
        """
        query = self.project(self.norm(x))
        array = query.new_zeros(len(seen) * rows + 1, query.shape[-1]).index_copy(0, slots, query)
        keys, values = seen.chunk(2, dim=-1)
        attended = self.attend(array[:-1].unflatten(0, (-1, rows)), keys, values, None).flatten(0, 1)
        return self.add(x, attended[slots.clamp(max=len(attended) - 1)])
