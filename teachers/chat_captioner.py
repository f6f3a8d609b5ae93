"""Chat models as captioners: LLaVA, Qwen-VL, Idefics, PaliGemma and their kin, asked by the config's ``prompt``.

Every image is shown as a square of one size, so that all prompts of a batch have one length and nothing is padded: the
prompt is tokenized once, when the model is loaded, and only images go through the model's own processor later.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import transformers

from teachers.cached_decoder import CachedDecoder
from teachers.device import Accelerator
from teachers.image_to_text import end_tokens_of
from teachers.protocols import ImageSpec
from teachers.spec import CaptionerSpec
from teachers.transformers import image_spec

#: Side of the square that models of any resolution are shown, unless the config says so: 256 tokens for Qwen2-VL.
_SIDE = 448


class Chat:
    """A ``Family`` of ``image_to_text``: a decoder over a prompt in which the image stands."""

    def __init__(self, spec: CaptionerSpec, accelerator: Accelerator, model: Any) -> None:
        assert spec.prompt is not None
        self.model, self._accelerator = accelerator.prepare(model, cast=True), accelerator
        processor = transformers.AutoProcessor.from_pretrained(spec.model, trust_remote_code=False)
        self.tokenizer, self._processor = processor.tokenizer, processor.image_processor
        text = model.config.get_text_config()
        self.ends = end_tokens_of(model.generation_config, model.config, text)
        self.start = self.ends[0]  # stands for the prompt
        self.image, self._options = chat_image_spec(self._processor.to_dict(), spec.image_size)
        self._prompt, self._images = self._prepared(processor, spec.prompt)
        self._length = self._prompt["input_ids"].shape[1]
        positions = getattr(text, "max_position_embeddings", None)
        self.room = None if positions is None else positions - self._length
        # Qwen's positions are (time, row, column): behind the image a text goes on as if it had been shorter.
        self._shifted = next((module for module in model.modules() if hasattr(module, "rope_deltas")), None)

    def inputs(self, pixels: torch.Tensor) -> dict[str, Any]:
        """RGB [B, 3, H, W] in 0 to 1 -> prompts and images as the model's own processor makes them."""
        prompts = {name: value.expand(len(pixels), -1) for name, value in self._prompt.items()}
        processed = self._processed(pixels.mul(255).round_().to(torch.uint8))
        return {**prompts, **{name: self._put(processed[name]) for name in self._images}}

    def begin(self, pixels: torch.Tensor) -> CachedDecoder:
        rows = CachedDecoder(self.model, self._accelerator, self.inputs(pixels), self.ends)
        if self._shifted is not None:
            rows.positions = (self._length + int(self._shifted.rope_deltas[0]), (3,))
        return rows

    def _prepared(self, processor: Any, prompt: str) -> tuple[dict[str, torch.Tensor], list[str]]:
        """The prompt with room for one image, int64 [1, length] by argument, and the arguments that are images."""
        text, start = prompt_text(processor, prompt), self.tokenizer.bos_token
        own = {"add_special_tokens": False} if start is not None and text.startswith(start) else {}
        image = torch.zeros(1, 3, self.image.height, self.image.width, dtype=torch.uint8)
        inputs = processor(images=[[image[0]]], text=[text], return_tensors="pt", **self._options, **own)
        images = [name for name in self._processed(image) if name in inputs]
        return {n: self._put(v) for n, v in inputs.items() if n not in images and n != "labels"}, images

    def _processed(self, images: torch.Tensor) -> Any:
        """uint8 [B, 3, H, W] -> what the image processor makes of them, by argument."""
        return self._processor([[image] for image in images], return_tensors="pt", **self._options)

    def _put(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.model.device, self.model.dtype if values.is_floating_point() else None)


def prompt_text(processor: Any, prompt: str) -> str:
    """A prompt as the model was taught to read it. Raises ValueError where that cannot be known.

    One that holds the model's image token is taken as it stands. PaliGemma reads plain text behind the image.
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
    raise ValueError(f"it has no chat template: write the whole `prompt`, with {image} where the image belongs")


def chat_image_spec(config: dict[str, Any], side: int | None) -> tuple[ImageSpec, dict[str, Any]]:
    """An image processor's config -> the square RGB image, in 0 to 1, that it is fed, and its options for it.

    ``side`` is the config's ``image_size``. Raises ValueError where the model's images have one size and it is
    another.
    """
    if tile := (config.get("max_image_size") or {}).get("longest_edge"):  # Idefics: one tile, or as many as fit
        side = side or tile
        options = {"size": {"longest_edge": side}, "do_image_splitting": side > tile}
        return _plain(side), options
    if "merge_size" in config:  # Qwen: any size
        unit = config["patch_size"] * config["merge_size"]
        side = side or _SIDE // unit * unit
        if side % unit:
            raise ValueError(f"image_size {side}: want a multiple of {unit}, the pixels of one token")
        return _plain(side), {}
    own = image_spec(config)
    if side is None or side == own.size:
        return _plain(own.size, own), {}
    if not config.get("image_grid_pinpoints"):  # LLaVA-NeXT: tiles of its size
        raise ValueError(
            f"image_size {side} is not used: its images are of {own.height} x {own.width} pixels; remove it"
        )
    return _plain(side, own), {}


def _plain(size: int | tuple[int, int], like: ImageSpec | None = None) -> ImageSpec:
    """RGB in 0 to 1, resized as another spec says, or squashed."""
    black, one = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return replace(like, size=size, mean=black, std=one) if like else ImageSpec(size, black, one, resize="squash")
