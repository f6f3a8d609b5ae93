"""Incremental decoding of CoCa with cached keys and values of the text so far and of the image.

At every step, open_clip's own forward pass runs both text towers over all tokens so far, projects the image tokens in
each layer for every row, and returns the logits of every position. Here a step processes only the newest tokens, and
the captions of an image share its keys and values. The class token, which open_clip appends after the last token, is
left out, since no other token attends to it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import open_clip.transformer as towers
import torch
from torch.nn.functional import pad

from teachers.coca_blocks import CrossAttentionBlock, SelfAttentionBlock, check_block
from teachers.device import Accelerator
from teachers.frozen import FrozenLinear
from teachers.rules import compact

#: Minimum rows of a compiled step, so that the tail of a batch does not compile further shapes.
_MIN_COMPILED_ROWS = 16


class CocaDecoder(torch.nn.Module):
    """A ``rules.Decoder`` of an open_clip CoCa for texts of at most ``length`` tokens.

    ``begin`` starts a batch of images and ends the previous one. With ``compiled``, shapes are static: rows are padded
    to a power of two and tokens attend to all ``length`` positions under a mask. Few steps are then compiled, or
    captured as CUDA graphs.

    Raises ValueError for a model that cannot be decoded token by token.
    """

    positions: torch.Tensor  # [length, width]: positional embedding
    cache: torch.Tensor  # [rows, layers, 2, length, width]: keys and values of text tokens
    image_cache: torch.Tensor  # [images, layers, image tokens, 2 * width]: keys and values of image tokens
    visible: torch.Tensor  # bool [rows, length]: tokens that the text tower attends to

    def __init__(self, model: Any, accelerator: Accelerator, length: int, compiled: bool = False) -> None:
        super().__init__()
        text, decoder = model.text, model.text_decoder
        check_decodable(model)
        linear = partial(FrozenLinear, accelerator=accelerator, packed=not compiled)
        self.embedding = text.token_embedding
        self.register_buffer("positions", text.positional_embedding[:length].detach(), persistent=False)
        self.text_blocks = torch.nn.ModuleList(SelfAttentionBlock(b, linear) for b in text.transformer.resblocks)
        # With a class token, open_clip passes the other tokens on without the final norm.
        self.text_norm = text.ln_final if text.cls_emb is None else torch.nn.Identity()
        self.decoder_blocks = torch.nn.ModuleList(SelfAttentionBlock(block, linear) for block in decoder.resblocks)
        self.cross_blocks = torch.nn.ModuleList(CrossAttentionBlock(block, linear) for block in decoder.cross_attn)
        self.final_norm = decoder.ln_final
        self.vocabulary = linear(decoder.text_projection.T, None)
        # (padding token, distance of the token that decides whether the newest is hidden); see `_is_hidden`
        self._hiding = None if text.cls_emb is None else (text.pad_id, 1 if text.correct_cls_mask else 2)
        self._accelerator, self._length, self._compiled = accelerator, length, compiled
        width, layers = self.positions.shape[1], len(self.text_blocks) + len(self.decoder_blocks)
        self.register_buffer("cache", self._zeros(0, layers, 2, length, width), persistent=False)
        self.register_buffer("image_cache", self._zeros(0, len(self.cross_blocks), 0, 2 * width), persistent=False)
        self.register_buffer("visible", self._zeros(0, length).bool(), persistent=False)
        self._run_step = accelerator.compile(self._step) if compiled else self._step

    def bytes_per_image(self, captions: int, image_tokens: int) -> int:
        """Bytes of the caches for one image with so many captions and image tokens."""
        text = captions * (len(self.text_blocks) + len(self.decoder_blocks)) * self._length
        values = text + len(self.cross_blocks) * image_tokens
        return 2 * values * self.positions.shape[1] * self._accelerator.dtype.itemsize

    def begin(self, images: torch.Tensor, captions: int) -> None:
        """Start with image tokens [B, n, width] and one row per image, to be selected at most ``captions`` times."""
        self._reserve(len(images), captions, images.shape[1])
        with self._accelerator.forward():
            for layer, block in enumerate(self.cross_blocks):
                assert isinstance(block, CrossAttentionBlock)
                self.image_cache[: len(images), layer] = block.keys_values(images)
        self.visible.zero_()
        if self._compiled:
            self.cache.zero_()  # masked values must be finite, since NaN times 0 is NaN
        self._filled, self._masked = 0, self._compiled
        self._assign_slots(torch.arange(len(images)))

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Start token and new tokens so far, int64 [rows, 1 + new tokens] -> logits [rows, vocabulary]."""
        rows, position = len(tokens), self._filled
        newest, slots = tokens[:, -1], self._slots
        hidden = self._is_hidden(tokens)
        self._masked = self._masked or bool(hidden.any())
        images, rows_per_image, visible = *self._shape, position + 1
        if self._compiled:
            images, rows_per_image, visible = len(self.image_cache), self._captions, self._length
            more = min(max(_MIN_COMPILED_ROWS, 1 << (rows - 1).bit_length()), len(self.cache)) - rows
            newest, hidden = pad(newest, (0, more)), pad(hidden, (0, more))
            slots = pad(slots, (0, more), value=images * rows_per_image)
        where = torch.tensor([position], device=tokens.device)
        with self._accelerator.forward():
            logits: torch.Tensor = self._run_step(
                newest, hidden, where, slots, images, rows_per_image, visible, self._masked
            )
        self._filled += 1
        return logits[:rows]

    def select_rows(self, rows: torch.Tensor) -> None:
        """Continue with these rows, int64 indices on the CPU. A row may be selected several times."""
        _move_rows(self.cache[:, :, :, : self._filled], rows)
        _move_rows(self.visible, rows)
        image_of = self._image_of[rows]
        in_use = torch.bincount(image_of, minlength=self._shape[0]) > 0
        if not in_use.all() and not self._compiled:
            order = torch.from_numpy(compact(in_use.numpy()))
            _move_rows(self.image_cache, order)
            new_index = torch.empty(len(in_use), dtype=torch.int64)
            new_index[order] = torch.arange(len(order))
            image_of = new_index[image_of]
        self._assign_slots(image_of)

    def _assign_slots(self, image_of: torch.Tensor) -> None:
        """Assign rows to slots by their images [rows]: slots of an image are adjacent, equally many for each image."""
        counts = torch.bincount(image_of)
        rows_per_image = self._captions if self._compiled else int(counts.max())
        by_image = image_of.argsort(stable=True)
        rank = torch.empty_like(image_of)
        rank[by_image] = torch.arange(len(image_of)) - (counts.cumsum(0) - counts)[image_of[by_image]]
        self._image_of, self._shape = image_of, (len(counts), rows_per_image)
        self._slots = (image_of * rows_per_image + rank).to(self.cache.device)

    def _is_hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """bool [rows]: whether the text tower never attends to the newest token.

        With a class token, open_clip masks padding, whose index may be an ordinary token of the text. Its mask is one
        position late by default: it hides the token after the padding.
        """
        if self._hiding is None or tokens.shape[1] < self._hiding[1]:
            return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        pad_id, back = self._hiding
        return tokens[:, -back] == pad_id

    def _step(
        self,
        newest: torch.Tensor,
        hidden: torch.Tensor,
        position: torch.Tensor,
        slots: torch.Tensor,
        images: int,
        rows_per_image: int,
        visible: int,
        masked: bool,
    ) -> torch.Tensor:
        rows = len(newest)
        self.visible[:rows].index_copy_(1, position, ~hidden[:, None])
        text_mask = self.visible[:rows, None, None, :visible] if masked else None
        causal = (torch.arange(visible, device=position.device) <= position)[None] if self._compiled else None
        caches = self.cache[:rows].unbind(1)
        text_caches, decoder_caches = caches[: len(self.text_blocks)], caches[len(self.text_blocks) :]
        image_caches = self.image_cache[:images].unbind(1)
        x = self.embedding(newest) + self.positions[position]
        for block, cache in zip(self.text_blocks, text_caches, strict=True):
            x = block(x, cache, position, visible, text_mask)
        x = self.text_norm(x)
        blocks = zip(self.decoder_blocks, decoder_caches, self.cross_blocks, image_caches, strict=True)
        for block, cache, cross, image_cache in blocks:
            x = cross(block(x, cache, position, visible, causal), image_cache, slots, rows_per_image)
        logits: torch.Tensor = self.vocabulary(self.final_norm(x))
        return logits

    def _reserve(self, images: int, captions: int, image_tokens: int) -> None:
        """Allocate the caches for a batch; those of the previous batch are reused if they are large enough."""
        if len(self.cache) < images * captions:
            self.cache = self._zeros(images * captions, *self.cache.shape[1:])
            self.visible = self._zeros(images * captions, self._length).bool()
        if len(self.image_cache) < images or self.image_cache.shape[2] != image_tokens:
            self.image_cache = self._zeros(images, len(self.cross_blocks), image_tokens, self.image_cache.shape[3])
        self._captions = captions

    def _zeros(self, *shape: int) -> torch.Tensor:
        # not `empty`, since a compiled step reads masked values
        return torch.zeros(shape, dtype=self._accelerator.dtype, device=self._accelerator.device)


def _move_rows(buffer: torch.Tensor, rows: torch.Tensor) -> None:
    """Copy ``buffer[rows]`` to the front of a buffer in place, skipping rows that are already there."""
    moved = (rows != torch.arange(len(rows))).nonzero().squeeze(1)
    if len(moved):
        targets, sources = moved.to(buffer.device), rows[moved].to(buffer.device)
        buffer[targets] = buffer[sources]


def check_decodable(model: Any) -> None:
    """Raise ValueError for a CoCa that cannot be decoded token by token."""
    if not isinstance(model.text, towers.TextTransformer) or model.text.attn_mask is None:
        raise ValueError("its text tower is not causal, so earlier tokens would depend on later ones")
    for block in (*model.text.transformer.resblocks, *model.text_decoder.resblocks, *model.text_decoder.cross_attn):
        check_block(block)
