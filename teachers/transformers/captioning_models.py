"""Models of transformers that caption: by an image alone (BLIP, GIT, vision-encoder-decoders), or by a prompt, too.

Chat models (LLaVA, Qwen-VL, Idefics, PaliGemma, ...) get the config's ``prompt``. All images are resized to one square
size, so all prompts of a batch have equal length and nothing is padded. The prompt is tokenized once, when the model is
loaded; later only images go through the model's own processor.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
import transformers

from teachers.protocols import ImageSpec
from teachers.runtime.accelerator import Accelerator
from teachers.spec import CaptionerSpec
from teachers.transformers.cached_decoder import CachedDecoder
from teachers.transformers.teacher import image_spec


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


#: Default image side for models that accept any resolution: 256 tokens for Qwen2-VL.
_DEFAULT_SIDE = 448


class Chat:
    """A ``CaptioningModel`` of ``image_to_text``: a decoder over a prompt that contains the image."""

    def __init__(self, spec: CaptionerSpec, accelerator: Accelerator, model: Any) -> None:
        assert spec.prompt is not None
        self.model, self._accelerator = accelerator.prepare(model, cast=True), accelerator
        processor = transformers.AutoProcessor.from_pretrained(spec.model, trust_remote_code=False)
        self.tokenizer, self._processor = processor.tokenizer, processor.image_processor
        text = model.config.get_text_config()
        self.ends = end_tokens_of(model.generation_config, model.config, text)
        self.start = self.ends[0]  # a placeholder: the decoder begins with the prompt
        self.image, self._options = chat_image_spec(self._processor.to_dict(), spec.image_size)
        self._prompt, self._image_arguments = self._tokenize_prompt(processor, spec.prompt)
        self._prompt_length = self._prompt["input_ids"].shape[1]
        positions = getattr(text, "max_position_embeddings", None)
        self.max_length = None if positions is None else positions - self._prompt_length
        # Qwen's positions are (time, row, column), and an image advances them by less than its number of tokens.
        self._rope = next((module for module in model.modules() if hasattr(module, "rope_deltas")), None)

    def inputs(self, pixels: torch.Tensor) -> dict[str, Any]:
        """RGB [B, 3, H, W] in 0 to 1 -> prompts and images as the model's own processor gives them."""
        prompts = {name: value.expand(len(pixels), -1) for name, value in self._prompt.items()}
        processed = self._process_images(pixels.mul(255).round_().to(torch.uint8))
        return {**prompts, **{name: self._to_device(processed[name]) for name in self._image_arguments}}

    def begin(self, pixels: torch.Tensor) -> CachedDecoder:
        decoder = CachedDecoder(self.model, self._accelerator, self.inputs(pixels), self.ends)
        if self._rope is not None:
            decoder.positions = (self._prompt_length + int(self._rope.rope_deltas[0]), (3,))
        return decoder

    def _tokenize_prompt(self, processor: Any, prompt: str) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Tokenize the prompt with one image -> (int64 [1, length] by argument, names of the image arguments)."""
        text, start = prompt_text(processor, prompt), self.tokenizer.bos_token
        options = {"add_special_tokens": False} if start is not None and text.startswith(start) else {}
        image = torch.zeros(1, 3, self.image.height, self.image.width, dtype=torch.uint8)
        inputs = processor(images=[[image[0]]], text=[text], return_tensors="pt", **self._options, **options)
        images = [name for name in self._process_images(image) if name in inputs]
        return {n: self._to_device(v) for n, v in inputs.items() if n not in images and n != "labels"}, images

    def _process_images(self, images: torch.Tensor) -> Any:
        """uint8 [B, 3, H, W] -> output of the image processor, by argument."""
        return self._processor([[image] for image in images], return_tensors="pt", **self._options)

    def _to_device(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.model.device, self.model.dtype if values.is_floating_point() else None)


def prompt_text(processor: Any, prompt: str) -> str:
    """Format a prompt with the model's chat template. Raises ValueError if the model has none.

    A prompt that contains the model's image token is used unchanged. PaliGemma takes plain text after the image.
    """
    image = str(getattr(processor, "boi_token", None) or getattr(processor, "image_token", "<image>"))
    if image in prompt:
        return prompt
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return text
    if type(processor).__name__.startswith("PaliGemma"):
        return image + prompt
    raise ValueError(f"the model has no chat template: write the whole `prompt`, with {image} in place of the image")


def chat_image_spec(config: dict[str, Any], side: int | None) -> tuple[ImageSpec, dict[str, Any]]:
    """Image processor's config -> (ImageSpec of its square input in 0 to 1, options of the processor).

    ``side`` is the config's ``image_size``. Raises ValueError if the model does not accept that size.
    """
    if tile := (config.get("max_image_size") or {}).get(
        "longest_edge"
    ):  # Idefics: one tile, or several for larger images
        side = side or tile
        options = {"size": {"longest_edge": side}, "do_image_splitting": side > tile}
        return _unnormalized(side), options
    if "merge_size" in config:  # Qwen: any size
        unit = config["patch_size"] * config["merge_size"]
        side = side or _DEFAULT_SIDE // unit * unit
        if side % unit:
            raise ValueError(f"image_size {side} must be a multiple of {unit}, the side of one image token in pixels")
        return _unnormalized(side), {}
    native = image_spec(config)
    if side is None or side == native.size:
        return _unnormalized(native.size, native), {}
    if not config.get("image_grid_pinpoints"):  # only LLaVA-NeXT splits larger images into tiles
        raise ValueError(
            f"image_size {side} is not used: the model's images are {native.height} x {native.width} pixels; remove it"
        )
    return _unnormalized(side, native), {}


def _unnormalized(size: int | tuple[int, int], like: ImageSpec | None = None) -> ImageSpec:
    """ImageSpec of RGB in 0 to 1, resized as ``like`` is, else squashed."""
    zeros, ones = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return replace(like, size=size, mean=zeros, std=ones) if like else ImageSpec(size, zeros, ones, resize="squash")
