"""Captioners of Hugging Face transformers: BLIP, GIT and vision-encoder-decoders here, chat models in their own file.

The library's ``generate`` samples from one global generator, so that a caption would depend on its neighbours. Here
rows are sampled by their own seeds, from the logits of the model's plain forward pass on its key/value cache. An image
goes through the model once, however many captions it gets: the cache that its prompt leaves behind is repeated, not
computed again. When a captioner is loaded, its logits are compared with those that ``generate`` sees.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import transformers

from teachers import transformers_catalog as catalog
from teachers.device import Accelerator
from teachers.protocols import Captioner, ImageSpec
from teachers.sampling import sample_nucleus, uniforms
from teachers.spec import CaptionerSpec
from teachers.transformers import image_spec

#: Most captions decoded side by side, and most bytes of their caches: bounds on a step's memory whatever the batch.
_ROWS, _CACHE_BYTES = 1024, 4 * 2**30
#: Largest difference from the logits of ``generate``, relative to the largest of them.
_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}
_TRIAL_WORDS = 4


class CachedRows:
    """Captions that grow together: each next word by a forward pass over the last one, on the cache of those before.

    ``context`` are arguments of every pass, a row each. ``positions`` is None where the model counts by itself, else
    the position of the first word and the shape before [rows, 1] in which the model wants them.
    """

    def __init__(
        self,
        forward: Any,
        prompt: dict[str, Any],
        context: dict[str, torch.Tensor] | None = None,
        positions: tuple[int, tuple[int, ...]] | None = None,
    ) -> None:
        self.positions = positions
        self._forward, self._context = forward, context or {}
        only_last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(forward).parameters else {}
        output = forward(**prompt, **self._context, **only_last, use_cache=True)
        self._first = output.logits[:, -1]
        self._name = "cache" if "cache" in output else "past_key_values"  # renamed by transformers 5
        self._cache = output[self._name]

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """A start token and the words so far, int64 [rows, 1 + words] -> [rows, vocabulary]."""
        words = tokens.shape[1] - 1
        if words == 0:
            return self._first
        arguments = {self._name: self._cache, **self._context}
        if self.positions is not None:
            first, shape = self.positions
            arguments["position_ids"] = torch.full((*shape, len(tokens), 1), first + words - 1, device=tokens.device)
        logits: torch.Tensor = self._forward(input_ids=tokens[:, -1:], use_cache=True, **arguments).logits[:, -1]
        return logits

    def take(self, rows: torch.Tensor) -> None:
        """Go on with these rows, int64 indices; one may be taken several times."""
        self._cache.reorder_cache(rows)
        self._first = self._first[rows]
        self._context = {name: values[rows] for name, values in self._context.items()}

    def row_bytes(self) -> int:
        """Bytes of one row's cache."""
        tensors = (value for layer in self._cache for value in layer if isinstance(value, torch.Tensor))
        return sum(value[0].numel() * value.element_size() for value in tensors if value.ndim > 1)


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

    def begin(self, pixels: torch.Tensor) -> CachedRows:
        """[B, 3, H, W] as ``image`` says -> a row for each image, at its first word."""
        ...


class TransformersCaptioner:
    """A model of transformers as a captioner. Raises ValueError for what the spec or the model has wrong."""

    def __init__(self, spec: CaptionerSpec, accelerator: Accelerator, family: Family, tokenizer: Any) -> None:
        if family.room is not None and spec.max_length > family.room:
            raise ValueError(
                f"max_length {spec.max_length} exceeds the {family.room} tokens that {spec.model} can write"
            )
        self.image, self.captions = family.image, spec.captions
        self._spec, self._accelerator, self._family, self._tokenizer = spec, accelerator, family, tokenizer
        self._ends = torch.tensor(family.ends, device=accelerator.device)
        self._rows, size = self._try_out()
        self._impossible = _impossible(tokenizer, family, size).to(accelerator.device)

    @torch.inference_mode()
    def caption(self, pixels: torch.Tensor, seeds: npt.NDArray[np.uint64]) -> list[list[str]]:
        """[B, 3, H, W] float32 and seeds [B, captions] -> captions of each image.

        Caption (b, n) is a function of image b and seeds[b, n], up to the rounding of matrix products, which may
        differ with the batch. Raises ValueError where the model's logits are NaN.
        """
        if seeds.shape != (len(pixels), self.captions):
            raise ValueError(f"want seeds of shape {(len(pixels), self.captions)}, got {seeds.shape}")
        images = max(1, self._rows // self.captions)
        texts: list[str] = []
        for i in range(0, len(pixels), images):
            with self._accelerator.forward():
                rows = self._family.begin(pixels[i : i + images])
                count = len(pixels[i : i + images])
                rows.take(torch.arange(count, device=pixels.device).repeat_interleave(self.captions))
            texts += [self._text(tokens) for tokens in self._decode(rows, seeds[i : i + images].reshape(-1))]
        return [texts[i : i + self.captions] for i in range(0, len(texts), self.captions)]

    def _decode(self, rows: CachedRows, seeds: npt.NDArray[np.uint64]) -> list[list[int]]:
        """Rows at their first word and seeds [rows] -> the words of each row."""
        steps = self._spec.max_length - 2  # start and end count
        end = self._family.ends[0]
        u = torch.from_numpy(uniforms(seeds, steps)).to(self._accelerator.device)
        tokens = torch.full((len(seeds), 1), self._family.start, device=self._accelerator.device)
        running = np.arange(len(seeds))
        finished: dict[int, list[int]] = {}
        for step in range(steps):
            with self._accelerator.forward():
                logits = self._next_logits(rows, tokens)
            if step < self._spec.min_length:
                logits[:, end] = -torch.inf
            sampled = sample_nucleus(logits, u[:, step], self._spec.temperature, self._spec.top_p)
            going = sampled != end
            kept = going.cpu().numpy()
            if not kept.all():
                finished.update(zip(running[~kept].tolist(), tokens[~going, 1:].tolist(), strict=True))
                running, tokens, sampled, u = running[kept], tokens[going], sampled[going], u[going]
                rows.take(going.nonzero().squeeze(1))
            tokens = torch.cat([tokens, sampled[:, None]], dim=1)
            if not len(running):
                break
        finished.update(zip(running.tolist(), tokens[:, 1:].tolist(), strict=True))
        return [finished[row] for row in range(len(seeds))]

    def _next_logits(self, rows: CachedRows, tokens: torch.Tensor) -> torch.Tensor:
        """Float32 [rows, vocabulary]: no special token is possible but the first end, which stands for them all."""
        logits = rows.next_logits(tokens).float()
        ends = logits[:, self._ends].logsumexp(-1)
        logits = logits.masked_fill(self._impossible, -torch.inf)
        logits[:, self._ends[0]] = ends
        return logits

    def _text(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()

    def _try_out(self) -> tuple[int, int]:
        """Caption a grey image both ways -> how many rows to decode side by side, and the logits of each.

        Raises ValueError where the logits are not those of transformers' own ``generate``: what a cache holds and how
        positions are counted has changed between its versions, and a wrong one still writes fluent captions.
        """
        model, spec = self._family.model, self.image
        pixels = torch.zeros(1, 3, spec.height, spec.width, device=self._accelerator.device)
        with self._accelerator.forward():
            reference = model.generate(
                **self._family.inputs(pixels),
                max_new_tokens=_TRIAL_WORDS,
                min_new_tokens=_TRIAL_WORDS,
                do_sample=False,
                num_beams=1,
                return_dict_in_generate=True,
                output_logits=True,
            )
            words = reference.sequences[:, -_TRIAL_WORDS:]
            start = torch.full((1, 1), self._family.start, device=words.device)
            rows = self._family.begin(pixels)
            sizes = []
            for step, wanted in enumerate(reference.logits):
                found = rows.next_logits(torch.cat([start, words[:, :step]], dim=1)).float()
                difference = ((found - wanted).abs().max() / wanted.abs().max()).item()
                if not difference <= _TOLERANCE[self._accelerator.precision]:
                    raise ValueError(
                        f"{type(model).__name__} of transformers {transformers.__version__} gives other logits on its "
                        f"cache than in `generate` ({difference:.1%} apart at word {step + 1}): use another version"
                    )
                sizes.append(rows.row_bytes())
        word_bytes = (sizes[-1] - sizes[0]) / (_TRIAL_WORDS - 1)
        side_by_side = _CACHE_BYTES / (sizes[0] + word_bytes * self._spec.max_length)
        return max(1, min(_ROWS, int(side_by_side))), found.shape[-1]


def load(spec: CaptionerSpec, accelerator: Accelerator) -> Captioner:
    """The captioner of a spec. Raises ValueError for a model that cannot caption or lacks weights; OSError for one that
    is not there."""
    assert spec.model is not None
    if catalog.is_folder(spec.model):
        catalog.config_of(spec.model)  # says what is wrong with a folder better than transformers does
    config = transformers.AutoConfig.from_pretrained(spec.model, trust_remote_code=False).to_dict()
    catalog.check_captioner(config, spec)
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(
        spec.model, trust_remote_code=False, output_loading_info=True
    )
    wrong = [*sorted(report["missing_keys"]), *map(str, report["mismatched_keys"])]
    if wrong:
        raise ValueError(f"the weights of {spec.model} do not fill {type(model).__name__}: {', '.join(wrong[:5])}")
    if config["model_type"] in catalog.CHAT:
        from teachers.chat_captioner import Chat

        chat = Chat(spec, accelerator, model)
        return TransformersCaptioner(spec, accelerator, chat, chat.tokenizer)
    processor = transformers.AutoImageProcessor.from_pretrained(spec.model, trust_remote_code=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec.model, trust_remote_code=False)
    model = accelerator.prepare(model.float())
    kind: Any = Git if config["model_type"] == "git" else Attending
    return TransformersCaptioner(
        spec, accelerator, kind(model, accelerator, image_spec(processor.to_dict())), tokenizer
    )


class Attending:
    """An image tower, and a text decoder that attends to what it gives: BLIP, and any vision-encoder-decoder."""

    def __init__(self, model: Any, accelerator: Accelerator, image: ImageSpec) -> None:
        self.model, self.image, self._layout = model, image, accelerator.layout
        if model.config.model_type == "blip":
            self._encoder, self._decoder, text = model.vision_model, model.text_decoder, model.config.text_config
            self.start: int = text.bos_token_id
            self.ends: tuple[int, ...] = (text.sep_token_id,)  # as its `generate` has it
        else:
            self._encoder, self._decoder, text = model.encoder, model.decoder, model.config.decoder
            self.start = _token("decoder_start_token_id", model.generation_config, model.config)
            self.ends = ends_of(model.generation_config, model.config, text)
        self.room: int | None = text.max_position_embeddings

    def inputs(self, pixels: torch.Tensor) -> dict[str, Any]:
        return {"pixel_values": self._layout(pixels)}

    def begin(self, pixels: torch.Tensor) -> CachedRows:
        hidden = self._encoder(pixel_values=self._layout(pixels)).last_hidden_state
        if hasattr(self.model, "enc_to_dec_proj"):  # of a vision-encoder-decoder whose sides differ in width
            hidden = self.model.enc_to_dec_proj(hidden)
        start = torch.full((len(pixels), 1), self.start, device=pixels.device)
        return CachedRows(self._decoder, {"input_ids": start}, {"encoder_hidden_states": hidden})


class Git:
    """One decoder over the image's features and then the words, whose positions count from the start token."""

    def __init__(self, model: Any, accelerator: Accelerator, image: ImageSpec) -> None:
        self.model, self.image, self._layout = model, image, accelerator.layout
        self.start, self.ends = model.config.bos_token_id, ends_of(model.generation_config, model.config)
        self.room: int | None = model.config.max_position_embeddings

    def inputs(self, pixels: torch.Tensor) -> dict[str, Any]:
        return {"pixel_values": self._layout(pixels)}

    def begin(self, pixels: torch.Tensor) -> CachedRows:
        start = torch.full((len(pixels), 1), self.start, device=pixels.device)
        return CachedRows(self.model, {"input_ids": start, **self.inputs(pixels)}, positions=(1, ()))


def ends_of(*configs: Any) -> tuple[int, ...]:
    """The tokens that end a text, by the first config that names any. Raises ValueError where none does."""
    ends = _token("eos_token_id", *configs)
    return tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)


def _token(name: str, *configs: Any) -> Any:
    for config in configs:
        if (value := getattr(config, name, None)) is not None:
            return value
    raise ValueError(f"the model's config names no {name}: it cannot caption")


def _impossible(tokenizer: Any, family: Family, size: int) -> torch.Tensor:
    """bool [size]: outputs that are no word, which are special tokens (ends too), markup, and what has no token."""
    mask = torch.arange(size) >= len(tokenizer)
    added = tokenizer.added_tokens_decoder.items()
    markup = {token for token, text in added if text.special or (text.content[0], text.content[-1]) == ("<", ">")}
    mask[[token for token in {family.start, *family.ends, *markup, *tokenizer.all_special_ids} if token < size]] = True
    return mask
