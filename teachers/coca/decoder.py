"""CoCa's text towers at one position of each row, with attention over cached keys and values that the caller holds.

Everything but attention uses the modules of open_clip's blocks, so activations, norms and layer scales are the model's
own. Linear layers are built by ``Linear``. A block does not add its last output to the residual stream: the next block
does, so that a compiled block adds and normalises in one kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import open_clip
import open_clip.transformer as towers
import torch
from torch.nn.functional import scaled_dot_product_attention

from teachers.decoding.sampling import compact
from teachers.fast_paths.frozen import FrozenLinear
from teachers.runtime.accelerator import Accelerator

Tensor = torch.Tensor
#: Weight [out, in] and bias -> module that computes ``x @ weight.T + bias``.
Linear = Callable[[Tensor, Tensor | None], torch.nn.Module]


class _Block(torch.nn.Module):
    """Residual block without the projections of queries, keys and values."""

    def __init__(self, block: Any, linear: Linear) -> None:
        super().__init__()
        attention, identity = block.attn, torch.nn.Identity()
        self.heads = attention.num_heads
        self.norm = block.ln_1
        self.out = linear(attention.out_proj.weight, attention.out_proj.bias)
        # norms and scales that only a CustomResidualAttentionBlock has
        self.query_norm = getattr(attention, "ln_q", identity)
        self.key_norm = getattr(attention, "ln_k", identity)
        self.head_scale = getattr(attention, "head_scale", None)
        self.inner_norm = getattr(attention, "ln_inner", identity)
        self.outer_norm = getattr(block, "ln_attn", identity)
        self.scale = block.ls_1
        parts = (linear(m.weight, m.bias) if isinstance(m, torch.nn.Linear) else m for m in block.mlp)
        self.mlp = torch.nn.Sequential(block.ln_2, *parts, block.ls_2)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from [B, n, width] to [B, m, width] -> [B, n, width]; bool ``mask`` broadcasts to [B, heads, n, m]."""
        query, keys, values = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, keys, values))
        x = scaled_dot_product_attention(self.query_norm(query), keys, values, attn_mask=mask)
        if self.head_scale is not None:
            x = x * self.head_scale
        return x.transpose(1, 2).flatten(2)

    def add(self, x: Tensor, attended: Tensor, slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add the attention output to the residual stream [rows, width] -> the stream, and the MLP of it.

        ``attended`` is [rows, width], or [slots, width] with the slot of each row.
        """
        projected = self.scale(self.outer_norm(self.out(self.inner_norm(attended))))
        x = x + (projected if slots is None else projected.index_select(0, slots))
        return x, self.mlp(x)


class SelfAttentionBlock(_Block):
    """Causal self-attention: tokens attend to the tokens before them and to themselves."""

    def __init__(self, block: Any, linear: Linear) -> None:
        super().__init__(block, linear)
        self.project = linear(block.attn.in_proj_weight, block.attn.in_proj_bias)

    def forward(
        self, x: Tensor, added: Tensor | None, cache: Tensor, position: Tensor, visible: int, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Process the newest tokens: the residual stream [rows, width] and what is to be added to it -> both.

        ``cache`` [rows, 2, length, width] holds the keys and values of all positions; those of the newest tokens are
        written to it at ``position``, int64 [rows], or [1] for all rows. Tokens attend to the first ``visible``
        positions that ``mask`` allows.
        """
        x = x if added is None else x + added
        query, key, value = (projected := self.project(self.norm(x))).chunk(3, dim=-1)
        if isinstance(self.key_norm, torch.nn.Identity):
            newest = projected[:, query.shape[1] :].unflatten(1, (2, 1, -1))
        else:
            key = self.key_norm(key.unflatten(-1, (self.heads, -1))).flatten(1)
            newest = torch.stack([key, value], dim=1)[:, :, None]
        if len(position) == 1:
            cache.index_copy_(2, position, newest)
        elif torch.compiler.is_compiling():  # in place; of `scatter_` inductor makes copies of the cache
            both = torch.arange(2, device=x.device)
            cache[torch.arange(len(x), device=x.device)[:, None], both, position[:, None]] = newest.squeeze(2)
        else:
            cache.scatter_(2, position[:, None, None, None].expand_as(newest), newest)
        keys, values = cache[:, :, :visible].unbind(1)
        return self.add(x, self.attend(query[:, None], keys, values, mask).squeeze(1))


class CrossAttentionBlock(_Block):
    """Cross-attention: text tokens attend to the tokens of their image."""

    def __init__(self, block: Any, linear: Linear) -> None:
        super().__init__(block, linear)
        width, bias = block.attn.out_proj.weight.shape[1], block.attn.in_proj_bias
        weights, biases = block.attn.in_proj_weight.split([width, 2 * width]), bias.split([width, 2 * width])
        self.project, self.project_image = (linear(*of) for of in zip(weights, biases, strict=True))
        self.image_norm = block.ln_1_kv

    def forward(
        self, x: Tensor, added: Tensor, image_cache: Tensor, slots: Tensor, row_of_slot: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Process the newest tokens, as ``SelfAttentionBlock`` does.

        ``image_cache`` [B, n, 2 * width] has the keys and values of the image tokens. Tokens are arranged by slots,
        equally many for each image, so that the captions of an image share its keys and values. Token i has slot
        ``slots[i]``, and ``row_of_slot`` is the token of each slot, any for an unused one.
        """
        x = x + added
        query = self.project(self.norm(x)).index_select(0, row_of_slot).unflatten(0, (len(image_cache), -1))
        keys, values = image_cache.chunk(2, dim=-1)
        attended = self.attend(query, keys, values, None).flatten(0, 1)
        if torch.compiler.is_compiling():  # one kernel reads rows, adds and normalises
            return self.add(x, attended, slots)
        return self.add(x, attended.index_select(0, slots))


class CocaNetwork(torch.nn.Module):
    """The text towers of an open_clip CoCa for texts of at most ``length`` tokens.

    ``packed`` packs the weights for CPUs, which ``torch.compile`` does not support. Raises ValueError for a model that
    cannot be decoded token by token.
    """

    positions: Tensor  # [length, width]: positional embedding

    def __init__(self, model: Any, accelerator: Accelerator, length: int, packed: bool = True) -> None:
        super().__init__()
        text, decoder = model.text, model.text_decoder
        check_decodable(model)
        linear = partial(FrozenLinear, accelerator=accelerator, packed=packed)
        self.embedding = text.token_embedding
        self.register_buffer("positions", text.positional_embedding[:length].detach(), persistent=False)
        self.text_blocks = torch.nn.ModuleList(SelfAttentionBlock(b, linear) for b in text.transformer.resblocks)
        # With a class token, open_clip passes the other tokens on without the final norm.
        self.text_norm = text.ln_final if text.cls_emb is None else torch.nn.Identity()
        self.decoder_blocks = torch.nn.ModuleList(SelfAttentionBlock(block, linear) for block in decoder.resblocks)
        self.cross_blocks = torch.nn.ModuleList(CrossAttentionBlock(block, linear) for block in decoder.cross_attn)
        self.final_norm = decoder.ln_final
        self.vocabulary = linear(decoder.text_projection.T, None)
        self.vocabulary_size = decoder.text_projection.shape[1]
        # The padding token, and the distance from the newest token to the one that decides whether the newest is
        # hidden. With a class token, open_clip masks padding, whose index may be an ordinary token of the text. Its
        # mask is one position late by default: it hides the token after the padding.
        self.hiding = None if text.cls_emb is None else (text.pad_id, 1 if text.correct_cls_mask else 2)
        self.length, self.width, self.dtype = length, self.positions.shape[1], accelerator.dtype
        self._device, self.head = accelerator.device, self._logits

    def text_cache(self, rows: int) -> Tensor:
        """Cache of the keys and values of text tokens, [rows, layers, 2, length, width]."""
        # not `empty`: under a mask, values that are not finite would spread, since NaN times 0 is NaN
        shape = rows, len(self.text_blocks) + len(self.decoder_blocks), 2, self.length, self.width
        return torch.zeros(shape, dtype=self.dtype, device=self._device)

    def image_cache(self, images: int, image_tokens: int) -> Tensor:
        """Cache of the keys and values of image tokens, [images, layers, image tokens, 2 * width]."""
        shape = images, len(self.cross_blocks), image_tokens, 2 * self.width
        return torch.zeros(shape, dtype=self.dtype, device=self._device)

    def bytes_per_image(self, captions: int, image_tokens: int) -> int:
        """Bytes of the caches for one image with so many captions and image tokens."""
        text = captions * (len(self.text_blocks) + len(self.decoder_blocks)) * self.length
        values = text + len(self.cross_blocks) * image_tokens
        return 2 * values * self.width * self.dtype.itemsize

    def fill_image_cache(self, images: Tensor, cache: Tensor, places: Tensor | None = None) -> None:
        """Write the keys and values of image tokens [B, n, width] to an image cache, at ``places``, int64 [B], by
        default to its first B images."""
        for layer, block in enumerate(self.cross_blocks):
            assert isinstance(block, CrossAttentionBlock)
            keys_values = block.project_image(block.image_norm(images))
            if places is None:
                cache[: len(images), layer] = keys_values
            else:
                cache[:, layer].index_copy_(0, places, keys_values)

    def step(
        self,
        newest: Tensor,
        position: Tensor,
        slots: Tensor,
        row_of_slot: Tensor,
        cache: Tensor,
        image_cache: Tensor,
        visible: int,
        text_mask: Tensor | None,
        causal: Tensor | None,
    ) -> Tensor:
        """Newest tokens [rows] at ``position``, int64 [rows] or [1] -> logits [rows, vocabulary] of the next tokens.

        The keys and values of the newest tokens are written to ``cache``, a text cache of as many rows. Tokens attend
        to the first ``visible`` positions that the masks of the text tower and of the decoder allow. Row i has slot
        ``slots[i]`` among the slots of the images in ``image_cache``; see ``CrossAttentionBlock``.
        """
        caches = cache.unbind(1)
        text_caches, decoder_caches = caches[: len(self.text_blocks)], caches[len(self.text_blocks) :]
        image_caches = image_cache.unbind(1)
        x: Tensor = self.embedding(newest)
        added: Any = self.positions[position]  # or None
        for block, text_cache in zip(self.text_blocks, text_caches, strict=True):
            x, added = block(x, added, text_cache, position, visible, text_mask)
        if not isinstance(self.text_norm, torch.nn.Identity):
            x, added = self.text_norm(x + added), None
        blocks = zip(self.decoder_blocks, decoder_caches, self.cross_blocks, image_caches, strict=True)
        for block, decoder_cache, cross, of_image in blocks:
            x, added = block(x, added, decoder_cache, position, visible, causal)
            x, added = cross(x, added, of_image, slots, row_of_slot)
        logits: Tensor = self.head(x, added)
        return logits

    def _logits(self, x: Tensor, added: Tensor) -> Tensor:
        logits: Tensor = self.vocabulary(self.final_norm(x + added))
        return logits


def check_decodable(model: Any) -> None:
    """Raise ValueError for a CoCa that cannot be decoded token by token."""
    if not isinstance(model.text, towers.TextTransformer) or model.text.attn_mask is None:
        raise ValueError("its text tower is not causal, so earlier tokens would depend on later ones")
    for block in (*model.text.transformer.resblocks, *model.text_decoder.resblocks, *model.text_decoder.cross_attn):
        attention = getattr(block, "attn", None)
        known = torch.nn.MultiheadAttention, getattr(towers, "Attention", torch.nn.MultiheadAttention)
        if not isinstance(attention, known) or getattr(attention, "in_proj_weight", None) is None:
            raise ValueError(f"blocks of type {type(block).__name__} are unknown")
        if getattr(attention, "logit_scale", None) is not None:
            raise ValueError("`scaled_cosine_attn` is not supported, as in open_clip's own forward pass, which fails")


# At every step, open_clip's own forward pass runs both text towers over all tokens so far, projects the image tokens in
# each layer for every row, and returns the logits of every position. Here a step processes only the newest tokens, and
# the captions of an image share its keys and values. The class token, which open_clip appends after the last token, is
# left out, since no other token attends to it. For releases of open_clip whose text towers this code does not know, its
# own forward pass remains.


class CocaDecoder:
    """A ``Decoder`` of an open_clip CoCa on a CPU: arrays have as many rows and positions as there are.

    ``begin`` starts a batch of images and ends the previous one. ``FixedCocaDecoder`` is the one for CUDA.
    """

    def __init__(self, network: CocaNetwork, accelerator: Accelerator) -> None:
        self.network, self._accelerator, self.bytes_per_image = network, accelerator, network.bytes_per_image
        self.cache, self.image_cache = network.text_cache(0), network.image_cache(0, 0)
        self.visible = torch.zeros(0, network.length, dtype=torch.bool)  # tokens that the text tower attends to

    def begin(self, images: torch.Tensor, captions: int) -> None:
        """Start with image tokens [B, n, width] and one row per image, to be selected at most ``captions`` times."""
        # Caches of the previous batch are reused if they are large enough.
        rows = len(images) * captions
        if len(self.cache) < rows:
            self.cache = self.network.text_cache(rows)
            self.visible = torch.zeros(rows, self.network.length, dtype=torch.bool)
        if len(self.image_cache) < len(images) or self.image_cache.shape[2] != images.shape[1]:
            self.image_cache = self.network.image_cache(len(images), images.shape[1])
        with self._accelerator.forward():
            self.network.fill_image_cache(images, self.image_cache)
        self.visible.zero_()
        self._filled, self._masked = 0, False
        self._assign_slots(torch.arange(len(images)))

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        rows, position = len(tokens), torch.tensor([self._filled])
        self._filled += 1
        # Whether the text tower never attends to the newest token; see ``CocaNetwork.hiding``.
        hidden, hiding = torch.zeros(rows, dtype=torch.bool), self.network.hiding
        if hiding is not None and tokens.shape[1] >= hiding[1]:
            hidden = tokens[:, -hiding[1]] == hiding[0]
        self._masked = self._masked or bool(hidden.any())
        self.visible[:rows].index_copy_(1, position, ~hidden[:, None])
        mask = self.visible[:rows, None, None, : self._filled] if self._masked else None
        with self._accelerator.forward():
            return self.network.step(
                tokens[:, -1],
                position,
                self._slots,
                self._row_of_slot,
                self.cache[:rows],
                self.image_cache[: self._images],
                self._filled,
                mask,
                None,
            )

    def select_rows(self, rows: torch.Tensor) -> None:
        _move_rows(self.cache[:, :, :, : self._filled], rows)
        _move_rows(self.visible, rows)
        image_of = self._image_of[rows]
        in_use = torch.bincount(image_of, minlength=self._images) > 0
        if not in_use.all():
            order = torch.from_numpy(compact(in_use.numpy()))
            _move_rows(self.image_cache, order)
            new_index = torch.empty(len(in_use), dtype=torch.int64)
            new_index[order] = torch.arange(len(order))
            image_of = new_index[image_of]
        self._assign_slots(image_of)

    def _assign_slots(self, image_of: torch.Tensor) -> None:
        """Assign rows to slots by their images [rows]: slots of an image are adjacent, equally many for each image."""
        counts = torch.bincount(image_of)
        rows_per_image = int(counts.max())
        by_image = image_of.argsort(stable=True)
        rank = torch.empty_like(image_of)
        rank[by_image] = torch.arange(len(image_of)) - (counts.cumsum(0) - counts)[image_of[by_image]]
        self._image_of, self._images = image_of, len(counts)
        self._slots = image_of * rows_per_image + rank
        self._row_of_slot = torch.zeros(len(counts) * rows_per_image, dtype=torch.int64)
        self._row_of_slot[self._slots] = torch.arange(len(image_of))


def _move_rows(buffer: torch.Tensor, rows: torch.Tensor) -> None:
    """Copy ``buffer[rows]`` to the front of a buffer in place, skipping rows that are already there."""
    moved = (rows != torch.arange(len(rows))).nonzero().squeeze(1)
    if len(moved):
        buffer[moved] = buffer[rows[moved]]


_LOG = logging.getLogger(__name__)
#: Releases with which the tests compare the network's logits with open_clip's.
_KNOWN = "3"
_TOKENS, _IMAGE_TOKENS, _TOLERANCE = 4, 3, 0.02  # of the comparison; the tolerance is relative to the largest logit


class PlainCocaDecoder:
    """A ``Decoder`` that computes all tokens so far again in each step. ``begin`` starts a batch of images."""

    def __init__(self, model: Any, accelerator: Accelerator) -> None:
        self._model, self._accelerator = model, accelerator
        self._images = self._image_of = torch.zeros(0)

    def bytes_per_image(self, captions: int, image_tokens: int) -> int:
        """Bytes of the logits of all positions of an image's rows."""
        positions, vocabulary = self._model.text.context_length, self._model.text_decoder.text_projection.shape[1]
        return 4 * captions * int(positions) * int(vocabulary)

    def begin(self, images: torch.Tensor, captions: int) -> None:
        """Start with image tokens [B, n, width] and one row per image."""
        self._images = images
        self._image_of = torch.arange(len(images), device=images.device)

    @torch.inference_mode()
    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        images = self._images[self._image_of]
        with self._accelerator.forward():
            found = self._model(None, tokens, image_latent=images[:, 0], image_embs=images, output_labels=False)
        logits: torch.Tensor = found["logits"][:, -1]
        return logits

    def select_rows(self, rows: torch.Tensor) -> None:
        self._image_of = self._image_of[rows]


def known_release() -> bool:
    return str(open_clip.__version__).partition(".")[0] == _KNOWN


@torch.inference_mode()
def make_network(model: Any, accelerator: Accelerator, length: int, packed: bool) -> CocaNetwork | None:
    """The cached network of a CoCa; None, with a warning, if open_clip is of another release and its logits differ."""
    if known_release():
        return CocaNetwork(model, accelerator, length, packed)
    try:
        if not packed:
            raise ValueError("its logits are compared on CPUs alone")
        check_decodable(model)
        network = CocaNetwork(model, accelerator, length, packed)
        # the logits of a few tokens of two random images
        random, width = torch.Generator().manual_seed(0), model.text_decoder.cross_attn[0].ln_1_kv.weight.shape[0]
        images = torch.randn(2, _IMAGE_TOKENS, width, generator=random)
        tokens = torch.randint(1, network.vocabulary_size, (2, _TOKENS), generator=random)
        cached, plain = CocaDecoder(network, accelerator), PlainCocaDecoder(model, accelerator)
        cached.begin(images, 1)
        plain.begin(images, 1)
        for count in range(1, _TOKENS + 1):
            found, expected = (one.next_logits(tokens[:, :count]).float() for one in (cached, plain))
            if not torch.allclose(found, expected, rtol=0, atol=_TOLERANCE * float(expected.abs().max())):
                raise ValueError(f"logits differ by {float((found - expected).abs().max()):.2g}")
        return network
    except Exception as error:  # whatever other insides raise
        _LOG.warning(
            "captions are decoded without a cache, many times as slowly: this code does not know the insides of "
            "open_clip %s (%s: %s)", open_clip.__version__, type(error).__name__, error,
        )  # fmt: skip
        return None
