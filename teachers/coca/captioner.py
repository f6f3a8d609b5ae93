"""Captioners of open_clip's CoCa. Each image is encoded once; its captions are decoded in parallel on a cache."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import torch

from teachers.coca.decoder import CocaDecoder, PlainCocaDecoder, check_decodable, known_release, make_network
from teachers.coca.fixed_decoder import SIZES, FixedCocaDecoder
from teachers.decoding.decode import DecodingCaptioner, decode
from teachers.decoding.device_sampling import DeviceSampler
from teachers.decoding.sampling import Schedule
from teachers.fast_paths.frozen import freeze
from teachers.fast_paths.recompilation import Compiler
from teachers.fast_paths.towers import check_equal, compile_images, least_cosine
from teachers.fast_paths.usage import fast_path
from teachers.open_clip import catalog
from teachers.open_clip.teacher import image_spec, load_model, model_name
from teachers.open_clip.text import tokenizer_of
from teachers.runtime.accelerator import GIB, Accelerator, cache_bytes
from teachers.runtime.determinism import unique_indices
from teachers.spec import CaptionerSpec

_LOG = logging.getLogger(__name__)
#: What is compared: texts of images with so many tokens. Their numbers differ from each other and from those of rows.
_IMAGES, _CAPTIONS, _IMAGE_TOKENS = 8, 3, 40


def compile_steps(decoder: FixedCocaDecoder, sampler: DeviceSampler | None, precision: str, wanted: bool) -> None:
    """Compile the steps of a decoder and what ``sampler`` does with their logits.

    If that fails (it needs a C compiler, for example) or changes more than rounding, they stay as they are, with one
    line in the log. With ``wanted``, what goes wrong raises.
    """
    _LOG.warning("compiling the decoding steps of a captioner, once for all sizes")
    compiler = Compiler("the decoding steps", asked=wanted)
    before, tokens = probe(decoder, sampler)
    try:
        decoder.compile(compiler)
        if sampler is not None:
            sampler.advance = compiler.for_any_rows(sampler.advance)
        after, others = probe(decoder, sampler, before)
        check_equal(before, after, least_cosine(precision))
        if not torch.equal(tokens, others):
            raise ValueError("other tokens are chosen from equal logits")
        compiler.accept()
    except Exception as error:
        if wanted:
            raise
        compiler.give_up(error)


@torch.inference_mode()
def probe(
    decoder: FixedCocaDecoder, sampler: DeviceSampler | None, chosen_from: Sequence[torch.Tensor] = ()
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Logits [rows, vocabulary] of random tokens and images, with few and with many positions to attend to, and the
    tokens that ``sampler`` chooses: from these logits, or from those of an earlier call.

    Steps are launched as in decoding, since torch compiles a function again where its flags are others.
    """
    network, generator = decoder.network, torch.Generator().manual_seed(0)
    device = network.positions.device
    images = torch.randn(_IMAGES, _IMAGE_TOKENS, network.width, generator=generator).to(device)
    found = []
    try:
        with decoder.opened(images.unbind(), _CAPTIONS, _IMAGES), unique_indices():
            rows, places = decoder.room(_IMAGES, _CAPTIONS)
            entry = Schedule(_IMAGES, _CAPTIONS, rows, places).enter()
            assert entry is not None
            decoder.enter(entry)
            tokens = torch.randint(network.vocabulary_size, (rows, network.length), generator=generator).to(device)
            logits = torch.zeros(rows, network.vocabulary_size, dtype=network.dtype, device=device)
            position = torch.zeros(rows, dtype=torch.int64, device=device)

            def step() -> None:
                logits.copy_(decoder.step(tokens, position))

            for place in (0, network.length - 1):
                position.fill_(place)
                decoder.launch(step, place)
                found.append(logits[: len(entry.rows)].clone())
            return found, _choose(decoder, sampler, logits, chosen_from or found)
    finally:
        decoder.release()
        if sampler is not None:
            sampler.release()


def _choose(
    decoder: FixedCocaDecoder, sampler: DeviceSampler | None, logits: torch.Tensor, values: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The tokens that a sampler chooses from ``values``, one after the other. ``logits`` is their place in memory."""
    if sampler is None:
        return torch.zeros(0)
    state = sampler.reserve(len(logits))
    for zeros in (state.tokens, state.done, state.broken, state.position):
        zeros.zero_()
    state.drawn.copy_(torch.rand(state.drawn.shape, generator=torch.Generator().manual_seed(0)))

    def choose() -> None:
        sampler.advance(logits, *state.of_step)

    for number, chosen_from in enumerate(values):
        logits[: len(chosen_from)] = chosen_from
        decoder.launch(choose, number)
    return state.tokens


#: Limits on captions decoded in parallel and on the bytes of their caches on a CPU, independent of the batch size.
_MAX_ROWS, _MAX_CACHE_BYTES = SIZES[-1], 2 * GIB


class CocaCaptioner(DecodingCaptioner):
    """A CoCa of open_clip as a captioner.

    Raises ValueError or FileNotFoundError for a wrong spec or a model that cannot caption.
    """

    def __init__(self, spec: CaptionerSpec, accelerator: Accelerator) -> None:
        catalog.check_coca(spec.name)
        model: Any = load_model(spec)
        check_model(spec, model)
        check_max_length(spec, model)
        self.image = image_spec(open_clip.get_model_preprocess_cfg(model))
        self._tokens = Vocabulary(tokenizer_of(model_name(spec)))
        accelerator.prepare(model)
        # The rest of the model is released: both parts copy its weights to layouts of their own.
        wanted = None if spec.compile == "auto" else spec.compile
        packed = accelerator.device.type == "cpu" and not wanted
        self._visual = model.visual
        on_cpu = accelerator.device.type == "cpu"
        network = make_network(model, accelerator, spec.max_length - 2, packed)
        if network is not None and (on_cpu or spec.fused_attention is not False):
            freeze(self._visual, accelerator, packed)
            if not on_cpu:
                fast_path("fused_attention", asked=bool(spec.fused_attention))
        if on_cpu and spec.graphs is True:
            fast_path("graphs", asked=True).fall_back("CUDA graphs need a GPU")
        self._encode = compile_images(self, self._visual, lambda pixels: self._visual(pixels)[1], wanted, accelerator)
        self._decoder: CocaDecoder | FixedCocaDecoder | PlainCocaDecoder
        if network is None:
            self._decoder, packed = PlainCocaDecoder(model, accelerator), True
        elif packed:
            self._decoder = CocaDecoder(network, accelerator)
        else:
            self._decoder = FixedCocaDecoder(network, accelerator, spec.uses_graphs, graphs_asked=spec.graphs is True)
        vocabulary = model.text_decoder.text_projection.shape[1]
        impossible = self._tokens.impossible(vocabulary)
        super().__init__(spec, accelerator, self._tokens.start, self._tokens.end, impossible, on_device=not packed)
        if isinstance(self._decoder, FixedCocaDecoder) and spec.compile:
            compile_steps(self._decoder, self._sampler, accelerator.precision, wanted=spec.compile is True)

    @property
    def by_group(self) -> bool:
        """Whether images of several batches are decoded together, by ``encode`` and ``decode``."""
        return self._sampler is not None

    def _generate(self, pixels: torch.Tensor, seeds: npt.NDArray[Any]) -> list[list[list[int]] | None]:
        images = self.encode(pixels)
        if self.by_group:
            return self.decode(images.unbind(), seeds)
        at_once, captions = self._at_once(images[0]), list[list[list[int]] | None]()
        for part in np.array_split(np.arange(len(images)), -(-len(images) // at_once)):
            with unique_indices():
                self._decoder.begin(images[part[0] : part[-1] + 1], self._spec.rows_per_image)
                captions += decode(self._decoder, self._rules, self._spec, seeds[part])
        return captions

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels float32 [B, 3, H, W] -> image tokens [B, n, width]."""
        with self._accelerator.forward():
            return self._encode(self._accelerator.layout(pixels))

    @torch.inference_mode()
    def decode(
        self, images: Sequence[torch.Tensor], seeds: npt.NDArray[Any], at_once: int | None = None
    ) -> list[list[list[int]] | None]:
        """As ``generate``, from the image tokens of each image. The captions of at most ``at_once`` are in work."""
        if not images:
            return []
        assert isinstance(self._decoder, FixedCocaDecoder)
        with unique_indices(), self._decoder.opened(images, self.captions, self._at_once(images[0], at_once)):
            return decode(self._decoder, self._rules, self._spec, seeds, self._sampler)

    @torch.inference_mode()
    def reserve(self, image: torch.Tensor, at_once: int | None = None) -> None:
        """Allocate what ``decode`` needs for many images with so many tokens as this one."""
        if isinstance(self._decoder, FixedCocaDecoder) and self._sampler is not None:
            self._decoder.reserve(image, self.captions, self._at_once(image, at_once))
            self._sampler.reserve(self._decoder.capacity)

    def _at_once(self, image: torch.Tensor, most: int | None = None) -> int:
        """Images with tokens [n, width] whose captions are in work, at most ``most``."""
        rows = self._spec.rows_per_image
        budget = cache_bytes(self._accelerator.device, _MAX_CACHE_BYTES)
        at_once = min(_MAX_ROWS // rows, budget // self._decoder.bytes_per_image(rows, len(image)))
        return max(1, at_once if most is None else min(at_once, most))

    def release_memory(self) -> None:
        """Return the memory that is kept for the next batch."""
        if self._sampler is not None:
            self._sampler.release()
        if isinstance(self._decoder, FixedCocaDecoder):
            self._decoder.release()

    def _text(self, tokens: list[int]) -> str:
        text: str = self._tokens.tokenizer.decode(tokens)
        return text.strip()


class Vocabulary:
    """Vocabulary of an open_clip tokenizer, open_clip's own or a wrapped one of Hugging Face.

    ``start`` and ``end`` are the tokens that it puts around a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.start, self.end = tokenizer("")[0, :2].tolist()
        is_wrapped = hasattr(tokenizer, "tokenizer")
        self.tokenizer = tokenizer.tokenizer if is_wrapped else tokenizer
        self._size = len(self.tokenizer) if is_wrapped else tokenizer.vocab_size

    def impossible(self, size: int) -> torch.Tensor:
        """Mask, bool [size], of the model's outputs that are unused or special tokens other than the end."""
        mask = torch.arange(size) >= self._size
        mask[[token for token in self.tokenizer.all_special_ids if token < size]] = True
        mask[self.start] = True
        mask[self.end] = False
        return mask


def check_model(spec: CaptionerSpec, model: Any) -> None:
    """Raise ValueError if a loaded model is not a CoCa that can write captions."""
    if not isinstance(model, open_clip.CoCa):
        raise ValueError(f"captioner model {spec.model!r} is a {type(model).__name__}, not a CoCa, and cannot caption")
    try:
        if known_release():
            check_decodable(model)
    except ValueError as error:
        raise ValueError(f"captioner model {spec.model!r} cannot caption: {error}") from error


def check_max_length(spec: CaptionerSpec, model: open_clip.CoCa) -> None:
    """Raise ValueError if a model cannot write captions of the spec's length."""
    # The end token is never an input, so a caption has one token more than the context.
    longest = min(model.text.context_length, model.text_decoder.context_length) + 1
    if spec.max_length > longest:
        raise ValueError(
            f"max_length {spec.max_length} exceeds the {longest} tokens that captioner model {spec.model!r} can write"
        )


def set_context(coca: Any, config: Mapping[str, Any], positions: int, random: bool = False) -> dict[str, Any]:
    """Give a CoCa ``positions`` text positions, that of its class token included; returns its ``model_cfg`` with them.

    Words keep their positional embeddings and the class token its own, so captions that fit both contexts keep their
    features. Further positions start as the last one of a word. open_clip's ``resize_text_pos_embed`` interpolates,
    which moves every word and counts the class token as one. With ``random``, all are drawn as open_clip draws them.
    Raises ValueError for a text tower without positional embeddings of its own, or without a class token.
    """
    text, decoder = coca.text, coca.text_decoder
    if getattr(text, "cls_emb", None) is None or not hasattr(text, "positional_embedding"):
        raise ValueError(
            "context: the text tower is not open_clip's own with a class token, so its context cannot be changed; "
            "remove the key"
        )
    words, own = positions - 1, text.positional_embedding.detach()
    kept, last = own[: min(words, len(own) - 1)], own[-2:-1]
    values = torch.cat([kept, last.expand(words - len(kept), -1), own[-1:]])
    if random:
        values = torch.nn.init.normal_(torch.empty_like(values), std=0.01)
    text.positional_embedding = torch.nn.Parameter(values)
    text.context_length, text.num_pos, decoder.context_length = words, positions, words
    text.attn_mask, decoder.attn_mask = text.build_causal_mask(), decoder.build_attention_mask()
    parts = ("text_cfg", "multimodal_cfg")
    return {**config, **{part: {**config[part], "context_length": words} for part in parts}}
