"""Incremental decoding of CoCa with cached keys and values of the text so far and of the image.

At every step, open_clip's own forward pass runs both text towers over all tokens so far, projects the image tokens in
each layer for every row, and returns the logits of every position. Here a step processes only the newest tokens, and
the captions of an image share its keys and values. The class token, which open_clip appends after the last token, is
left out, since no other token attends to it. For releases of open_clip whose text towers this code does not know, its
own forward pass remains.
"""

from __future__ import annotations

import logging
from typing import Any

import open_clip
import torch

from teachers.coca.network import CocaNetwork, check_decodable
from teachers.decoding.rules import compact
from teachers.runtime.accelerator import Accelerator


class CocaDecoder:
    """A ``rules.Decoder`` of an open_clip CoCa on a CPU: arrays have as many rows and positions as there are.

    ``begin`` starts a batch of images and ends the previous one. ``FixedCocaDecoder`` is the one for CUDA.
    """

    def __init__(self, network: CocaNetwork, accelerator: Accelerator) -> None:
        self.network, self._accelerator = network, accelerator
        self.cache, self.image_cache = network.text_cache(0), network.image_cache(0, 0)
        self.visible = torch.zeros(0, network.length, dtype=torch.bool)  # tokens that the text tower attends to

    def bytes_per_image(self, captions: int, image_tokens: int) -> int:
        return self.network.bytes_per_image(captions, image_tokens)

    def begin(self, images: torch.Tensor, captions: int) -> None:
        """Start with image tokens [B, n, width] and one row per image, to be selected at most ``captions`` times."""
        self._reserve(len(images), captions, images.shape[1])
        with self._accelerator.forward():
            self.network.fill_image_cache(images, self.image_cache)
        self.visible.zero_()
        self._filled, self._masked = 0, False
        self._assign_slots(torch.arange(len(images)))

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        rows, position = len(tokens), torch.tensor([self._filled])
        self._filled += 1
        hidden = self._is_hidden(tokens)
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

    def _is_hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """bool [rows]: whether the text tower never attends to the newest token; see ``CocaNetwork.hiding``."""
        hiding = self.network.hiding
        if hiding is None or tokens.shape[1] < hiding[1]:
            return torch.zeros(len(tokens), dtype=torch.bool)
        pad_id, back = hiding
        return tokens[:, -back] == pad_id

    def _reserve(self, images: int, captions: int, image_tokens: int) -> None:
        """Allocate the caches for a batch; those of the previous batch are reused if they are large enough."""
        if len(self.cache) < images * captions:
            self.cache = self.network.text_cache(images * captions)
            self.visible = torch.zeros(images * captions, self.network.length, dtype=torch.bool)
        if len(self.image_cache) < images or self.image_cache.shape[2] != image_tokens:
            self.image_cache = self.network.image_cache(images, image_tokens)


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
    """A ``rules.Decoder`` that computes all tokens so far again in each step. ``begin`` starts a batch of images."""

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


def make_network(model: Any, accelerator: Accelerator, length: int, packed: bool) -> CocaNetwork | None:
    """The cached network of a CoCa; None, with a warning, if open_clip is of another release and its logits differ."""
    if known_release():
        return CocaNetwork(model, accelerator, length, packed)
    try:
        if not packed:
            raise ValueError("its logits are compared on CPUs alone")
        check_decodable(model)
        network = CocaNetwork(model, accelerator, length, packed)
        _compare(network, model, accelerator)
        return network
    except Exception as error:  # whatever other insides raise
        _LOG.warning(
            "captions are decoded without a cache, many times as slowly: this code does not know the insides of "
            "open_clip %s (%s: %s)", open_clip.__version__, type(error).__name__, error,
        )  # fmt: skip
        return None


@torch.inference_mode()
def _compare(network: CocaNetwork, model: Any, accelerator: Accelerator) -> None:
    """Raise ValueError if the logits of a few tokens of two random images differ."""
    random = torch.Generator().manual_seed(0)
    images = torch.randn(2, _IMAGE_TOKENS, model.text_decoder.cross_attn[0].ln_1_kv.weight.shape[0], generator=random)
    tokens = torch.randint(1, network.vocabulary_size, (2, _TOKENS), generator=random)
    cached, plain = CocaDecoder(network, accelerator), PlainCocaDecoder(model, accelerator)
    cached.begin(images, 1)
    plain.begin(images, 1)
    for count in range(1, _TOKENS + 1):
        found, expected = (one.next_logits(tokens[:, :count]).float() for one in (cached, plain))
        if not torch.allclose(found, expected, rtol=0, atol=_TOLERANCE * float(expected.abs().max())):
            raise ValueError(f"logits differ by {float((found - expected).abs().max()):.2g}")
