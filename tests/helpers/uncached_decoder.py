"""Reference for ``CocaDecoder``: next-token logits by open_clip's own forward pass over all tokens so far."""

from __future__ import annotations

from typing import Any

import torch


class UncachedDecoder:
    """A ``teachers.decoding.rules.Decoder`` without a cache, over image tokens [B, n, width]."""

    def __init__(self, model: Any, images: torch.Tensor) -> None:
        self._model, self._images = model, images

    @torch.inference_mode()
    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        latent = self._images[:, 0]  # open_clip only returns it
        out = self._model(None, tokens, image_latent=latent, image_embs=self._images, output_labels=False)
        logits: torch.Tensor = out["logits"][:, -1]
        return logits

    def select_rows(self, rows: torch.Tensor) -> None:
        self._images = self._images[rows]
