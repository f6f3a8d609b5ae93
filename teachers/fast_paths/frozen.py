"""Inference layers with fixed weights, cast to the precision and packed for the device once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from teachers.runtime.accelerator import Accelerator
from teachers.runtime.flops import eager


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
        is_bf16 = weight.dtype == torch.bfloat16
        self._packed = (
            packed
            and weight.device.type == "cpu"
            and torch.backends.mkldnn.is_available()
            and (bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) if is_bf16 else weight.dtype == torch.float32)
        )
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


# Linear layers in fp8: inputs and weights in e4m3, each row of either with a scale of its own, sums in fp32. Inputs are
# scaled when they come, by their largest absolute value. PyTorch's own products are used. Attention, norms,
# convolutions and the residual stream stay as they are.

_LARGEST = 448.0  # of e4m3
_MULTIPLE = 16  # sides of the matrices that PyTorch multiplies in fp8
_CAPABILITY = (8, 9)  # Ada; Hopper has 9.0


def check_device(device: torch.device) -> None:
    """Raise ValueError if a device has no products in fp8."""
    fix = "set `precision` of this model to bf16 or auto"
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        raise ValueError(f"`precision: fp8` needs torch 2.6, and this is {torch.__version__}: {fix}")
    if device.type != "cuda" or torch.version.hip is not None:
        raise ValueError(f"`precision: fp8` needs an NVIDIA GPU: {fix}")
    if (capability := torch.cuda.get_device_capability(device)) < _CAPABILITY:
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has no fp8 (compute capability {'.'.join(map(str, capability))}, "
            f"and 8.9 or newer is needed): {fix}"
        )


class Float8Linear(torch.nn.Module):
    """``x @ weight.T + bias`` with weight [out, in] and bias [out], in fp8; the result is bf16."""

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        values, scale = _to_fp8(weight.detach())
        self.register_buffer("weight", values, persistent=False)
        self.register_buffer("scale", scale.T.contiguous(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().bfloat16(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out] in bf16."""
        values, scale = _to_fp8(x.flatten(0, -2))
        out = torch._scaled_mm(
            values,
            self.weight.T,
            scale_a=scale,
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return out.unflatten(0, x.shape[:-1])


def _to_fp8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, width] -> values in e4m3, and the scale of each row, float32 [n, 1]."""
    rows = rows.float()
    scale = rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * _LARGEST) / _LARGEST
    return (rows / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn), scale


class Float8Layers:
    """The linear layers of some blocks, replaced by fp8 in place. Raises ValueError if there is none."""

    def __init__(self, blocks: Iterable[torch.nn.Module]) -> None:
        self._layers: list[tuple[torch.nn.Module, str, torch.nn.Module, torch.nn.Module]] = []
        for block in blocks:
            for parent in [*block.modules()]:
                # projections of self-attention that is one product are not used
                unused = isinstance(parent, FrozenAttention) and parent.whole is not None
                for name, child in [*parent.named_children()]:
                    if type(child) not in (torch.nn.Linear, FrozenLinear) or (
                        unused and name in ("query", "key_value")
                    ):
                        continue
                    weight: torch.Tensor = child.weight  # type: ignore[assignment]
                    if not any(side % _MULTIPLE for side in weight.shape):  # sides that PyTorch multiplies
                        self._layers.append((parent, name, child, Float8Linear(weight, child.bias)))  # type: ignore[arg-type]
        if not self._layers:
            raise ValueError("its image tower has no linear layers for `precision: fp8`: set bf16 or auto")
        self._use(fp8=True)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Compute with the layers as they were, without compiled code."""
        self._use(fp8=False)
        try:
            with eager():
                yield
        finally:
            self._use(fp8=True)

    def _use(self, fp8: bool) -> None:
        for parent, name, before, after in self._layers:
            setattr(parent, name, after if fp8 else before)
