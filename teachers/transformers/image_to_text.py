"""Image-to-text models of transformers, which caption without a prompt: BLIP, GIT, vision-encoder-decoders."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from teachers.protocols import ImageSpec
from teachers.runtime.accelerator import Accelerator
from teachers.transformers.cached_decoder import CachedDecoder


class CaptioningModel(Protocol):
    """One kind of captioning model, as ``TransformersCaptioner`` uses it.

    ``start`` is the token before the first new token; each of ``ends`` ends a caption. ``max_length`` is the number of
    tokens that fit after the prompt, None without a limit.
    """

    model: Any
    image: ImageSpec
    start: int
    ends: tuple[int, ...]
    max_length: int | None

    def inputs(self, pixels: torch.Tensor) -> dict[str, Any]:
        """Pixels [B, 3, H, W], preprocessed by ``image`` -> arguments of ``model.generate``."""
        ...

    def begin(self, pixels: torch.Tensor) -> CachedDecoder:
        """Pixels [B, 3, H, W], preprocessed by ``image`` -> decoder with one row per image, without new tokens."""
        ...


class EncoderDecoder:
    """An image encoder and a text decoder with cross-attention to its output: BLIP and vision-encoder-decoders."""

    def __init__(self, model: Any, accelerator: Accelerator, image: ImageSpec) -> None:
        self.model, self.image, self._accelerator = model, image, accelerator
        if model.config.model_type == "blip":
            self._encoder, self._decoder, text = model.vision_model, model.text_decoder, model.config.text_config
            self.start: int = text.bos_token_id
            self.ends: tuple[int, ...] = (text.sep_token_id,)  # the end token of BLIP's `generate`
        else:
            self._encoder, self._decoder, text = model.encoder, model.decoder, model.config.decoder
            self.start = _read_token("decoder_start_token_id", model.generation_config, model.config)
            self.ends = end_tokens_of(model.generation_config, model.config, text)
        self.max_length: int | None = text.max_position_embeddings

    def inputs(self, pixels: torch.Tensor) -> dict[str, Any]:
        return {"pixel_values": self._accelerator.layout(pixels)}

    def begin(self, pixels: torch.Tensor) -> CachedDecoder:
        with self._accelerator.forward():
            hidden = self._encoder(**self.inputs(pixels)).last_hidden_state
            if hasattr(self.model, "enc_to_dec_proj"):  # a vision-encoder-decoder whose two widths differ
                hidden = self.model.enc_to_dec_proj(hidden)
        prompt = {"input_ids": torch.full((len(pixels), 1), self.start, device=pixels.device)}
        return CachedDecoder(self._decoder, self._accelerator, prompt, self.ends, {"encoder_hidden_states": hidden})


class Git:
    """GIT: one decoder over the image features followed by the text, whose positions count from the start token."""

    def __init__(self, model: Any, accelerator: Accelerator, image: ImageSpec) -> None:
        self.model, self.image, self._accelerator = model, image, accelerator
        self.start, self.ends = model.config.bos_token_id, end_tokens_of(model.generation_config, model.config)
        self.max_length: int | None = model.config.max_position_embeddings

    def inputs(self, pixels: torch.Tensor) -> dict[str, Any]:
        return {"pixel_values": self._accelerator.layout(pixels)}

    def begin(self, pixels: torch.Tensor) -> CachedDecoder:
        start = torch.full((len(pixels), 1), self.start, device=pixels.device)
        prompt = {"input_ids": start, **self.inputs(pixels)}
        return CachedDecoder(self.model, self._accelerator, prompt, self.ends, positions=(1, ()))


def end_tokens_of(*configs: Any) -> tuple[int, ...]:
    """End tokens by the first config that has any. Raises ValueError if none has."""
    ends = _read_token("eos_token_id", *configs)
    return tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)


def _read_token(name: str, *configs: Any) -> Any:
    for config in configs:
        if (value := getattr(config, name, None)) is not None:
            return value
    raise ValueError(f"the model's config has no {name}: it cannot caption")
