"""Kinds of transformers models that caption an image without being asked: BLIP, GIT, vision-encoder-decoders."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from teachers.cached_decoder import CachedDecoder
from teachers.device import Accelerator
from teachers.protocols import ImageSpec


class Family(Protocol):
    """What captioning needs to know of one kind of model.

    ``start`` stands before the first word, ``ends`` each end a caption; ``room`` is the most tokens of a caption that
    fit behind the prompt, None where the model sets no limit.
    """

    model: Any
    image: ImageSpec
    start: int
    ends: tuple[int, ...]
    room: int | None

    def inputs(self, pixels: torch.Tensor) -> dict[str, Any]:
        """[B, 3, H, W] as ``image`` says -> the arguments that ``model.generate`` takes."""
        ...

    def begin(self, pixels: torch.Tensor) -> CachedDecoder:
        """[B, 3, H, W] as ``image`` says -> a row for each image, at its first word."""
        ...


class Attending:
    """An image tower, and a text decoder that attends to what it gives: BLIP, and any vision-encoder-decoder."""

    def __init__(self, model: Any, accelerator: Accelerator, image: ImageSpec) -> None:
        self.model, self.image, self._accelerator = model, image, accelerator
        if model.config.model_type == "blip":
            self._encoder, self._decoder, text = model.vision_model, model.text_decoder, model.config.text_config
            self.start: int = text.bos_token_id
            self.ends: tuple[int, ...] = (text.sep_token_id,)  # as its `generate` has it
        else:
            self._encoder, self._decoder, text = model.encoder, model.decoder, model.config.decoder
            self.start = _token("decoder_start_token_id", model.generation_config, model.config)
            self.ends = end_tokens_of(model.generation_config, model.config, text)
        self.room: int | None = text.max_position_embeddings

    def inputs(self, pixels: torch.Tensor) -> dict[str, Any]:
        return {"pixel_values": self._accelerator.layout(pixels)}

    def begin(self, pixels: torch.Tensor) -> CachedDecoder:
        with self._accelerator.forward():
            hidden = self._encoder(**self.inputs(pixels)).last_hidden_state
            if hasattr(self.model, "enc_to_dec_proj"):  # of a vision-encoder-decoder whose sides differ in width
                hidden = self.model.enc_to_dec_proj(hidden)
        prompt = {"input_ids": torch.full((len(pixels), 1), self.start, device=pixels.device)}
        return CachedDecoder(self._decoder, self._accelerator, prompt, self.ends, {"encoder_hidden_states": hidden})


class Git:
    """One decoder over the image's features and then the words, whose positions count from the start token."""

    def __init__(self, model: Any, accelerator: Accelerator, image: ImageSpec) -> None:
        self.model, self.image, self._accelerator = model, image, accelerator
        self.start, self.ends = model.config.bos_token_id, end_tokens_of(model.generation_config, model.config)
        self.room: int | None = model.config.max_position_embeddings

    def inputs(self, pixels: torch.Tensor) -> dict[str, Any]:
        return {"pixel_values": self._accelerator.layout(pixels)}

    def begin(self, pixels: torch.Tensor) -> CachedDecoder:
        start = torch.full((len(pixels), 1), self.start, device=pixels.device)
        prompt = {"input_ids": start, **self.inputs(pixels)}
        return CachedDecoder(self.model, self._accelerator, prompt, self.ends, positions=(1, ()))


def end_tokens_of(*configs: Any) -> tuple[int, ...]:
    """The tokens that end a text, by the first config that names any. Raises ValueError where none does."""
    ends = _token("eos_token_id", *configs)
    return tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)


def _token(name: str, *configs: Any) -> Any:
    for config in configs:
        if (value := getattr(config, name, None)) is not None:
            return value
    raise ValueError(f"the model's config names no {name}: it cannot caption")
