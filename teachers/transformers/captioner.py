"""Captioners of Hugging Face transformers: image-to-text models, and chat models with a prompt.

The library's ``generate`` samples from one global generator, so a caption would depend on the rest of the batch. Here
each row is sampled by its own seed, from the logits of the model's forward pass with a key/value cache. Each image
goes through the model once: the cache of its prompt is copied for its captions.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy.typing as npt
import torch
import transformers

from teachers.decoding.decode import DecodingCaptioner, decode
from teachers.decoding.sampling import Entry
from teachers.fast_paths.recompilation import Step, decoding_kernels
from teachers.protocols import Captioner, ImageSpec
from teachers.runtime.accelerator import GIB, Accelerator, cache_bytes, upload
from teachers.spec import CaptionerSpec
from teachers.transformers.family import CHAT_MODELS, TransformersCaptionerSpec, is_local_folder, read_config
from teachers.transformers.teacher import image_spec


class CachedDecoder:
    """A ``Decoder`` whose rows begin with a prompt. Each step is a forward pass over the newest token alone.

    ``ends`` are the end tokens, merged into the first. ``context`` are arguments of every pass with one row each.
    ``positions`` is None if the model counts positions itself, else the position of the first new token and the
    shape in front of [rows, 1] that the model expects.
    """

    ahead = 0  # all rows get a token in each step
    capacity = 0  # nothing is reserved: arrays grow with the text

    def __init__(
        self,
        model: Any,
        accelerator: Accelerator,
        prompt: dict[str, Any],
        ends: tuple[int, ...],
        context: dict[str, torch.Tensor] | None = None,
        positions: tuple[int, tuple[int, ...]] | None = None,
    ) -> None:
        self.positions = positions
        self._model, self._accelerator, self._ends, self._context = model, accelerator, ends, context or {}
        only_last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        with accelerator.forward():
            output = model(**prompt, **self._context, **only_last, use_cache=True)
        self._logits, self._count = output.logits[:, -1], 0  # of the prompt's last token; new tokens in the cache
        self._cache_name = "cache" if "cache" in output else "past_key_values"  # renamed by transformers 5
        self._cache = output[self._cache_name]

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Start token and new tokens so far, int64 [rows, 1 + new tokens] -> float32 [rows, vocabulary]."""
        count = tokens.shape[1] - 1
        if count == 0:
            return merge_end_tokens(self._logits, self._ends)
        arguments = {self._cache_name: self._cache, **self._context}
        if self.positions is not None:
            first, shape = self.positions
            arguments["position_ids"] = torch.full((*shape, len(tokens), 1), first + count - 1, device=tokens.device)
        with self._accelerator.forward():
            logits = self._model(input_ids=tokens[:, -1:], use_cache=True, **arguments).logits
        return merge_end_tokens(logits[:, -1], self._ends)

    @staticmethod
    def room(images: int, captions: int) -> tuple[int, int]:
        """Number of rows and of images in them: all at once, because their texts grow together."""
        return images * captions, images

    def enter(self, entry: Entry) -> None:
        """Begin the captions of all images."""
        self.select_rows(upload(entry.place_of, self._logits.device))

    @staticmethod
    def padded(rows: int) -> int:
        """Number of rows that steps have for so many rows: the same."""
        return rows

    def launch(self, step: Step, longest: int) -> None:
        """Run a step, which calls ``step`` once."""
        with decoding_kernels(self._accelerator.device):
            step()
        self._count += 1

    def run(self, kind: str, size: int, step: Step) -> None:
        """Run other work between steps."""
        with decoding_kernels(self._accelerator.device):
            step()

    def step(self, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """As ``device_sampling.DeviceDecoder.step``."""
        return self.next_logits(tokens[:, : self._count + 1])

    def select_rows(self, rows: torch.Tensor, used: torch.Tensor | None = None) -> None:
        """Continue with these rows, int64 indices on the device. A row may be selected several times."""
        self._cache.reorder_cache(rows)
        if not self._count:
            self._logits = self._logits[rows]
        self._context = {name: values[rows] for name, values in self._context.items()}

    def row_bytes(self) -> int:
        """Bytes of one row's cache."""
        tensors = (value for layer in self._cache for value in layer if isinstance(value, torch.Tensor))
        return sum(value[0].numel() * value.element_size() for value in tensors if value.ndim > 1)


def merge_end_tokens(logits: torch.Tensor, ends: tuple[int, ...]) -> torch.Tensor:
    """Logits [..., vocabulary] -> float32, with the total probability of all end tokens in the first of them.

    The logits of the other end tokens stay as they are; the decoding rules exclude them.
    """
    logits = logits.float()
    if len(ends) > 1:
        logits[..., ends[0]] = logits[..., list(ends)].logsumexp(-1)
    return logits


# Each kind of model has ``inputs``: pixels [B, 3, H, W], preprocessed by ``image``, -> arguments of ``model.generate``;
# and ``begin``: pixels -> a decoder with one row per image, without new tokens. ``start`` is the token before the first
# new token; each of ``ends`` ends a caption. ``max_length`` is the number of tokens that fit after the prompt, None
# without a limit.


class ImageToText:
    """A model that captions by an image alone: BLIP and vision-encoder-decoders, whose decoder has cross-attention to
    the output of an image encoder, and GIT, one decoder over the image features followed by the text."""

    def __init__(self, model: Any, accelerator: Accelerator, image: ImageSpec) -> None:
        self.model, self.image, self._accelerator = model, image, accelerator
        self._encoder: Any = None
        if model.config.model_type == "git":
            text = model.config
            self.start: int = text.bos_token_id
            self.ends = end_tokens_of(model.generation_config, text)
        elif model.config.model_type == "blip":
            self._encoder, self._decoder, text = model.vision_model, model.text_decoder, model.config.text_config
            self.start = text.bos_token_id
            self.ends = (text.sep_token_id,)  # the end token of BLIP's `generate`
        else:
            self._encoder, self._decoder, text = model.encoder, model.decoder, model.config.decoder
            self.start = _read_token("decoder_start_token_id", model.generation_config, model.config)
            self.ends = end_tokens_of(model.generation_config, model.config, text)
        self.max_length: int | None = text.max_position_embeddings

    def inputs(self, pixels: torch.Tensor) -> dict[str, Any]:
        return {"pixel_values": self._accelerator.layout(pixels)}

    def begin(self, pixels: torch.Tensor) -> CachedDecoder:
        prompt = {"input_ids": torch.full((len(pixels), 1), self.start, device=pixels.device)}
        if self._encoder is None:  # GIT's positions count from the start token
            prompt |= self.inputs(pixels)
            return CachedDecoder(self.model, self._accelerator, prompt, self.ends, positions=(1, ()))
        with self._accelerator.forward():
            hidden = self._encoder(**self.inputs(pixels)).last_hidden_state
            if hasattr(self.model, "enc_to_dec_proj"):  # a vision-encoder-decoder whose two widths differ
                hidden = self.model.enc_to_dec_proj(hidden)
        return CachedDecoder(self._decoder, self._accelerator, prompt, self.ends, {"encoder_hidden_states": hidden})


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
    """A chat model (LLaVA, Qwen-VL, Idefics, PaliGemma, ...): a decoder over a prompt that contains the image.

    All images are resized to one square size, so all prompts of a batch have equal length and nothing is padded. The
    prompt is tokenized once, when the model is loaded; later only images go through the model's own processor.
    """

    def __init__(self, spec: CaptionerSpec, accelerator: Accelerator, model: Any) -> None:
        assert spec.prompt is not None
        self.model, self._accelerator = accelerator.prepare(model, cast=True), accelerator
        processor = transformers.AutoProcessor.from_pretrained(spec.model, trust_remote_code=False)
        self.tokenizer = processor.tokenizer
        text = model.config.get_text_config()
        self.ends = end_tokens_of(model.generation_config, model.config, text)
        self.start = self.ends[0]  # a placeholder: the decoder begins with the prompt
        self.image, options = chat_image_spec(processor.image_processor.to_dict(), spec.image_size)
        self._process = partial(processor.image_processor, return_tensors="pt", **options)  # lists of images
        prompt, begins = prompt_text(processor, spec.prompt), self.tokenizer.bos_token
        if begins is not None and prompt.startswith(begins):
            options = {**options, "add_special_tokens": False}
        image = torch.zeros(1, 3, self.image.height, self.image.width, dtype=torch.uint8)
        inputs = processor(images=[[image[0]]], text=[prompt], return_tensors="pt", **options)
        self._image_arguments = [name for name in self._process([[image[0]]]) if name in inputs]
        others = {name: value for name, value in inputs.items() if name not in {*self._image_arguments, "labels"}}
        self._prompt = {name: self._to_device(value) for name, value in others.items()}  # int64 [1, length] by argument
        self._prompt_length = self._prompt["input_ids"].shape[1]
        positions = getattr(text, "max_position_embeddings", None)
        self.max_length: int | None = None if positions is None else positions - self._prompt_length
        # Qwen's positions are (time, row, column), and an image advances them by less than its number of tokens.
        self._rope = next((module for module in model.modules() if hasattr(module, "rope_deltas")), None)

    def inputs(self, pixels: torch.Tensor) -> dict[str, Any]:
        """RGB [B, 3, H, W] in 0 to 1 -> prompts and images as the model's own processor gives them."""
        prompts = {name: value.expand(len(pixels), -1) for name, value in self._prompt.items()}
        processed = self._process([[image] for image in pixels.mul(255).round_().to(torch.uint8)])
        return {**prompts, **{name: self._to_device(processed[name]) for name in self._image_arguments}}

    def begin(self, pixels: torch.Tensor) -> CachedDecoder:
        decoder = CachedDecoder(self.model, self._accelerator, self.inputs(pixels), self.ends)
        if self._rope is not None:
            decoder.positions = (self._prompt_length + int(self._rope.rope_deltas[0]), (3,))
        return decoder

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


#: One kind of captioning model.
CaptioningModel = ImageToText | Chat

#: Limits on captions decoded in parallel and on the bytes of their caches on a CPU, independent of the batch size.
_MAX_ROWS, _MAX_CACHE_BYTES = 1024, 4 * GIB
#: Maximum difference from the logits of ``generate``, relative to the largest of them.
_TOLERANCE = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 5e-2, "fp16": 1e-2}
_PROBE_TOKENS = 4


class TransformersCaptioner(DecodingCaptioner):
    """A model of transformers as a captioner. Its logits are compared with those of ``generate`` first.

    Raises ValueError for a wrong spec or an unsupported model.
    """

    def __init__(self, spec: CaptionerSpec, accelerator: Accelerator, model: CaptioningModel, tokenizer: Any) -> None:
        if model.max_length is not None and spec.max_length > model.max_length:
            raise ValueError(
                f"max_length {spec.max_length} exceeds the {model.max_length} tokens that {spec.model} can write"
            )
        self.image, self._model, self._tokenizer = model.image, model, tokenizer
        self._rows, vocabulary = self._compare_with_generate(spec, accelerator)
        # Special tokens, end tokens but the first, markup, and indices without a token are neither text nor its end.
        impossible = torch.arange(vocabulary) >= len(tokenizer)
        added = tokenizer.added_tokens_decoder.items()
        markup = {token for token, text in added if text.special or (text.content[0], text.content[-1]) == ("<", ">")}
        others = {model.start, *model.ends, *markup, *tokenizer.all_special_ids}
        impossible[[token for token in others if token < vocabulary]] = True
        impossible[model.ends[0]] = False
        on_device = accelerator.device.type != "cpu"
        super().__init__(spec, accelerator, model.start, model.ends[0], impossible, on_device)

    def _generate(self, pixels: torch.Tensor, seeds: npt.NDArray[Any]) -> list[list[list[int]] | None]:
        images = max(1, self._rows // self._spec.rows_per_image)
        captions: list[list[list[int]] | None] = []
        for i in range(0, len(pixels), images):
            decoder = self._model.begin(pixels[i : i + images])
            captions += decode(decoder, self._rules, self._spec, seeds[i : i + images], self._sampler)
        return captions

    def _text(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()

    @torch.inference_mode()
    def _compare_with_generate(self, spec: CaptionerSpec, accelerator: Accelerator) -> tuple[int, int]:
        """Caption a blank image here and by ``generate`` -> (rows to decode in parallel, size of the vocabulary).

        Raises ValueError if the logits differ. Cache layout and position counting have changed between versions of
        transformers, and a wrong one still writes fluent captions.
        """
        model, image, ends = self._model.model, self.image, self._model.ends
        pixels = torch.zeros(1, 3, image.height, image.width, device=accelerator.device)
        with accelerator.forward():
            reference = model.generate(
                **self._model.inputs(pixels),
                max_new_tokens=_PROBE_TOKENS,
                min_new_tokens=_PROBE_TOKENS,
                do_sample=False,
                num_beams=1,
                return_dict_in_generate=True,
                output_logits=True,
            )
            tokens = reference.sequences[:, -_PROBE_TOKENS:]
            start = torch.full((1, 1), self._model.start, device=tokens.device)
            decoder = self._model.begin(pixels)
            sizes = []
            for step, logits in enumerate(reference.logits):
                expected = merge_end_tokens(logits, ends)
                found = decoder.next_logits(torch.cat([start, tokens[:, :step]], dim=1))
                difference = ((found - expected).abs().max() / expected.abs().max()).item()
                if not math.isfinite(difference):
                    raise ValueError("logits are not finite: check the weights, or use `precision: bf16` or `fp32`")
                if difference > _TOLERANCE[accelerator.precision]:
                    raise ValueError(
                        f"{type(model).__name__} of transformers {transformers.__version__} gives other "
                        f"logits with its cache than in `generate` ({difference:.1%} apart at token {step + 1}): "
                        "use another version"
                    )
                sizes.append(decoder.row_bytes())
        token_bytes = (sizes[-1] - sizes[0]) / (_PROBE_TOKENS - 1)
        budget = cache_bytes(accelerator.device, _MAX_CACHE_BYTES)
        rows = budget / (sizes[0] + token_bytes * spec.max_length)
        return max(1, min(_MAX_ROWS, int(rows))), found.shape[-1]


def load(spec: TransformersCaptionerSpec, accelerator: Accelerator) -> Captioner:
    """Load the captioner of a spec.

    Raises ValueError for a model that cannot caption or lacks weights; OSError for a model that does not exist.
    """
    config, model = load_network(spec, transformers.AutoModelForImageTextToText)
    if config["model_type"] in CHAT_MODELS:
        chat = Chat(spec, accelerator, model)
        return TransformersCaptioner(spec, accelerator, chat, chat.tokenizer)
    processor = transformers.AutoImageProcessor.from_pretrained(spec.model, trust_remote_code=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec.model, trust_remote_code=False)
    model, image = accelerator.prepare(model.float()), image_spec(processor.to_dict())
    return TransformersCaptioner(spec, accelerator, ImageToText(model, accelerator, image), tokenizer)


def load_network(spec: TransformersCaptionerSpec, auto: Any) -> tuple[dict[str, Any], Any]:
    """The config and the network of a spec, by an ``AutoModel``; raises as ``load``."""
    if is_local_folder(spec.name):
        read_config(spec.name)  # has better error messages for folders than transformers
    config = transformers.AutoConfig.from_pretrained(spec.name, trust_remote_code=False).to_dict()
    spec.check_config(config)
    model, report = auto.from_pretrained(spec.model, trust_remote_code=False, output_loading_info=True)
    misfits = [*sorted(report["missing_keys"]), *map(str, report["mismatched_keys"])]
    if misfits:
        raise ValueError(f"the weights of {spec.model} do not fit {type(model).__name__}: {', '.join(misfits[:5])}")
    return config, model
