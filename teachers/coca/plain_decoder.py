"""CoCa decoded by open_clip's own forward pass, for releases of open_clip whose text towers this code does not know."""

from __future__ import annotations

import logging
from typing import Any

import open_clip
import torch

from teachers.coca.decoder import CocaDecoder
from teachers.coca.network import CocaNetwork, check_decodable
from teachers.runtime.accelerator import Accelerator

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
