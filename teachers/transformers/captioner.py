"""Captioners of Hugging Face transformers: image-to-text models, and chat models with a prompt.

The library's ``generate`` samples from one global generator, so a caption would depend on the rest of the batch. Here
each row is sampled by its own seed, from the logits of the model's forward pass with a key/value cache. Each image goes
through the model once: the cache of its prompt is copied for its captions. The constructor compares the logits with
those of ``generate``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy.typing as npt
import torch
import transformers

from teachers.decoding.decode import DecodingCaptioner, decode
from teachers.protocols import Captioner
from teachers.runtime.accelerator import Accelerator
from teachers.runtime.memory import GIB, cache_bytes
from teachers.spec import CaptionerSpec
from teachers.transformers.cached_decoder import merge_end_tokens
from teachers.transformers.captioning_models import CaptioningModel, Chat, EncoderDecoder, Git
from teachers.transformers.family import CHAT_MODELS, TransformersCaptionerSpec, is_local_folder, read_config
from teachers.transformers.teacher import image_spec

#: Limits on captions decoded in parallel and on the bytes of their caches on a CPU, independent of the batch size.
_MAX_ROWS, _MAX_CACHE_BYTES = 1024, 4 * GIB
#: Maximum difference from the logits of ``generate``, relative to the largest of them.
_TOLERANCE = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 5e-2, "fp16": 1e-2}
_PROBE_TOKENS = 4


class TransformersCaptioner(DecodingCaptioner):
    """A model of transformers as a captioner. Raises ValueError for a wrong spec or an unsupported model."""

    def __init__(self, spec: CaptionerSpec, accelerator: Accelerator, model: CaptioningModel, tokenizer: Any) -> None:
        if model.max_length is not None and spec.max_length > model.max_length:
            raise ValueError(
                f"max_length {spec.max_length} exceeds the {model.max_length} tokens that {spec.model} can write"
            )
        self.image, self._model, self._tokenizer = model.image, model, tokenizer
        self._rows, vocabulary = self._compare_with_generate(spec, accelerator)
        impossible = impossible_tokens(tokenizer, model, vocabulary)
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
    kind: type[EncoderDecoder | Git] = Git if config["model_type"] == "git" else EncoderDecoder
    return TransformersCaptioner(spec, accelerator, kind(model, accelerator, image), tokenizer)


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


def impossible_tokens(tokenizer: Any, model: CaptioningModel, size: int) -> torch.Tensor:
    """Mask, bool [size], of tokens that are neither text nor the end of one.

    These are special tokens, all end tokens but the first, markup, and indices without a token.
    """
    mask = torch.arange(size) >= len(tokenizer)
    added = tokenizer.added_tokens_decoder.items()
    markup = {token for token, text in added if text.special or (text.content[0], text.content[-1]) == ("<", ">")}
    mask[[token for token in {model.start, *model.ends, *markup, *tokenizer.all_special_ids} if token < size]] = True
    mask[model.ends[0]] = False
    return mask
