"""CoCa's next words, each computed once: keys and values of the words before and of the image are kept.

At every step open_clip's own forward pass runs both towers over all words so far, projects the image's tokens into
each layer for every row, and gives the logits of every position. Here a step is the newest words' alone. The captions
of an image share its keys and values. The class token, which open_clip appends behind the last word, is left out: no
word sees it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import open_clip.transformer as towers
import torch
from torch.nn.functional import pad

from teachers.coca_blocks import CrossBlock, SelfBlock, check_block
from teachers.device import Accelerator
from teachers.frozen import FrozenLinear
from teachers.rules import compact

#: Fewest rows of a compiled step, so that the tail of a batch does not compile shapes of its own.
_FEWEST = 16


class CocaDecoder(torch.nn.Module):
    """Next-token logits of an open_clip CoCa for texts of at most ``length`` tokens: a ``rules.Decoder``.

    ``begin`` starts a batch of images and ends the one before. With ``compiled`` shapes are static: rows are rounded
    up to a power of two and words look at all ``length`` positions under a mask, so that few steps are compiled, or
    captured as CUDA graphs.

    Raises ValueError for a model whose words cannot be computed one by one.
    """

    places: torch.Tensor  # [length, width]: positional embedding
    past: torch.Tensor  # [rows, layers, 2, length, width]: keys and values of words
    seen: torch.Tensor  # [images, layers, tokens, 2 * width]: keys and values of image tokens
    visible: torch.Tensor  # bool [rows, length]: the words that the text tower looks at

    def __init__(self, model: Any, accelerator: Accelerator, length: int, compiled: bool = False) -> None:
        super().__init__()
        text, decoder = model.text, model.text_decoder
        check_decodable(model)
        linear = partial(FrozenLinear, accelerator=accelerator, packed=not compiled)
        self.embedding = text.token_embedding
        self.register_buffer("places", text.positional_embedding[:length].detach(), persistent=False)
        self.words = torch.nn.ModuleList(SelfBlock(block, linear) for block in text.transformer.resblocks)
        # Behind the class token open_clip gives the words without the last norm.
        self.words_norm = text.ln_final if text.cls_emb is None else torch.nn.Identity()
        self.context = torch.nn.ModuleList(SelfBlock(block, linear) for block in decoder.resblocks)
        self.vision = torch.nn.ModuleList(CrossBlock(block, linear) for block in decoder.cross_attn)
        self.last_norm = decoder.ln_final
        self.vocabulary = linear(decoder.text_projection.T, None)
        self._hiding = None if text.cls_emb is None else (text.pad_id, 1 if text.correct_cls_mask else 2)
        self._accelerator, self._length, self._compiled = accelerator, length, compiled
        width, layers = self.places.shape[1], len(self.words) + len(self.context)
        self.register_buffer("past", self._cache(0, layers, 2, length, width), persistent=False)
        self.register_buffer("seen", self._cache(0, len(self.vision), 0, 2 * width), persistent=False)
        self.register_buffer("visible", self._cache(0, length).bool(), persistent=False)
        self._run = accelerator.compile(self._step) if compiled else self._step

    def bytes_per_image(self, captions: int, tokens: int) -> int:
        """What the caches take of an image with so many captions and image tokens."""
        words = captions * (len(self.words) + len(self.context)) * self._length
        return 2 * (words + len(self.vision) * tokens) * self.places.shape[1] * self._accelerator.dtype.itemsize

    def begin(self, images: torch.Tensor, captions: int) -> None:
        """Image tokens [B, n, width]: a row for each image, of which ``captions`` at most will be taken."""
        self._reserve(len(images), captions, images.shape[1])
        with self._accelerator.forward():
            for layer, block in enumerate(self.vision):
                assert isinstance(block, CrossBlock)
                self.seen[: len(images), layer] = block.keys_values(images)
        self.visible.zero_()
        if self._compiled:
            self.past.zero_()  # what is masked must be finite: NaN times 0 is NaN
        self._filled, self._masked = 0, self._compiled
        self._place(torch.arange(len(images)))

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """The start token and the words so far, int64 [rows, 1 + words] -> [rows, vocabulary]."""
        rows, position = len(tokens), self._filled
        newest, slots = tokens[:, -1], self._slots
        hidden = self._hidden(tokens)
        self._masked = self._masked or bool(hidden.any())
        images, side, reach = *self._shape, position + 1
        if self._compiled:
            images, side, reach = len(self.seen), self._side, self._length
            more = min(max(_FEWEST, 1 << (rows - 1).bit_length()), len(self.past)) - rows
            newest, hidden = pad(newest, (0, more)), pad(hidden, (0, more))
            slots = pad(slots, (0, more), value=images * side)
        where = torch.tensor([position], device=tokens.device)
        with self._accelerator.forward():
            logits: torch.Tensor = self._run(newest, hidden, where, slots, images, side, reach, self._masked)
        self._filled += 1
        return logits[:rows]

    def select_rows(self, rows: torch.Tensor) -> None:
        """Go on with these rows: int64 indices on the CPU; one may be taken several times."""
        _move(self.past[:, :, :, : self._filled], rows)
        _move(self.visible, rows)
        image_of = self._image_of[rows]
        alive = torch.bincount(image_of, minlength=self._shape[0]) > 0
        if not alive.all() and not self._compiled:
            order = torch.from_numpy(compact(alive.numpy()))
            _move(self.seen, order)
            renamed = torch.empty(len(alive), dtype=torch.int64)
            renamed[order] = torch.arange(len(order))
            image_of = renamed[image_of]
        self._place(image_of)

    def _place(self, image_of: torch.Tensor) -> None:
        """Rows [rows] -> their slots: those of an image stand side by side, as many for each as the most has."""
        counts = torch.bincount(image_of)
        side = self._side if self._compiled else int(counts.max())
        by_image = image_of.argsort(stable=True)
        rank = torch.empty_like(image_of)
        rank[by_image] = torch.arange(len(image_of)) - (counts.cumsum(0) - counts)[image_of[by_image]]
        self._image_of, self._shape = image_of, (len(counts), side)
        self._slots = (image_of * side + rank).to(self.past.device)

    def _hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """bool [rows]: whether the text tower never looks at the newest word.

        open_clip hides padding, which may be a word, from it; and it is one position late: the word behind is hidden.
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
        side: int,
        reach: int,
        masked: bool,
    ) -> torch.Tensor:
        rows = len(newest)
        self.visible[:rows].index_copy_(1, position, ~hidden[:, None])
        visible = self.visible[:rows, None, None, :reach] if masked else None
        written = (torch.arange(reach, device=position.device) <= position)[None] if self._compiled else None
        layers = self.past[:rows].unbind(1)
        of_words, of_context = layers[: len(self.words)], layers[len(self.words) :]
        of_images = self.seen[:images].unbind(1)
        x = self.embedding(newest) + self.places[position]
        for block, past in zip(self.words, of_words, strict=True):
            x = block(x, past, position, reach, visible)
        x = self.words_norm(x)
        for block, past, cross, seen in zip(self.context, of_context, self.vision, of_images, strict=True):
            x = cross(block(x, past, position, reach, written), seen, slots, side)
        logits: torch.Tensor = self.vocabulary(self.last_norm(x))
        return logits

    def _reserve(self, images: int, captions: int, tokens: int) -> None:
        """Caches for so many; those there are stay where they are if they are large enough."""
        if len(self.past) < images * captions:
            self.past = self._cache(images * captions, *self.past.shape[1:])
            self.visible = self._cache(images * captions, self._length).bool()
        if len(self.seen) < images or self.seen.shape[2] != tokens:
            self.seen = self._cache(images, len(self.vision), tokens, self.seen.shape[3])
        self._side = captions

    def _cache(self, *shape: int) -> torch.Tensor:
        # Not `empty`: a compiled step reads what is masked.
        return torch.zeros(shape, dtype=self._accelerator.dtype, device=self._accelerator.device)


def _move(buffer: torch.Tensor, rows: torch.Tensor) -> None:
    """Put ``buffer[rows]`` at the front of a buffer, in place; rows that are there already are not touched."""
    moved = (rows != torch.arange(len(rows))).nonzero().squeeze(1)
    if len(moved):
        to, of = moved.to(buffer.device), rows[moved].to(buffer.device)
        buffer[to] = buffer[of]


def check_decodable(model: Any) -> None:
    """Raise ValueError for a CoCa whose words cannot be computed one by one."""
    if not isinstance(model.text, towers.TextTransformer) or model.text.attn_mask is None:
        raise ValueError("its text tower is not causal, so the words so far would have to see the words to come")
    for block in (*model.text.transformer.resblocks, *model.text_decoder.resblocks, *model.text_decoder.cross_attn):
        check_block(block)
