"""CoCa's text towers at one position of each row, over caches that the caller holds."""

from __future__ import annotations

from functools import partial
from typing import Any

import open_clip.transformer as towers
import torch

from teachers.coca.blocks import CrossAttentionBlock, SelfAttentionBlock, check_block
from teachers.fast_paths.frozen import FrozenLinear
from teachers.fast_paths.recompilation import Compiler
from teachers.runtime.accelerator import Accelerator

Tensor = torch.Tensor


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
        layers = len(self.text_blocks) + len(self.decoder_blocks)
        return self._zeros(rows, layers, 2, self.length, self.width)

    def image_cache(self, images: int, image_tokens: int) -> Tensor:
        """Cache of the keys and values of image tokens, [images, layers, image tokens, 2 * width]."""
        return self._zeros(images, len(self.cross_blocks), image_tokens, 2 * self.width)

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
            if places is None:
                cache[: len(images), layer] = block.keys_values(images)
            else:
                cache[:, layer].index_copy_(0, places, block.keys_values(images))

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

    def compile_parts(self, compiler: Compiler) -> None:
        """Compile what follows the embeddings by parts, so that alike blocks share a graph.

        A graph of all blocks would take minutes.
        """
        for block in (*self.text_blocks, *self.decoder_blocks, *self.cross_blocks):
            block._compiled_call_impl = compiler.for_any_rows(block._call_impl)
        self.head = compiler.for_any_rows(self._logits)

    def _zeros(self, *shape: int) -> Tensor:
        # not `empty`: under a mask, values that are not finite would spread, since NaN times 0 is NaN
        return torch.zeros(shape, dtype=self.dtype, device=self._device)


def check_decodable(model: Any) -> None:
    """Raise ValueError for a CoCa that cannot be decoded token by token."""
    if not isinstance(model.text, towers.TextTransformer) or model.text.attn_mask is None:
        raise ValueError("its text tower is not causal, so earlier tokens would depend on later ones")
    for block in (*model.text.transformer.resblocks, *model.text_decoder.resblocks, *model.text_decoder.cross_attn):
        check_block(block)
