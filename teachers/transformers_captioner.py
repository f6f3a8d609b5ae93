"""Captioners of Hugging Face transformers: image-to-text models, and chat models that are asked for a caption.

The library's ``generate`` samples from one global generator, so that a caption would depend on its neighbours. Here
rows are sampled by their own seeds, from the logits of the model's plain forward pass on its key/value cache. An image
goes through the model once, however many captions it gets: the cache that its prompt leaves behind is repeated, not
computed again. When a captioner is loaded, its logits are compared with those that ``generate`` sees.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from teachers import transformers_catalog as catalog
from teachers.cached_decoder import merge_end_tokens
from teachers.chat_captioner import Chat
from teachers.decoding import decode
from teachers.device import Accelerator
from teachers.image_to_text import Attending, Family, Git
from teachers.protocols import Captioner
from teachers.rules import DecodingRules
from teachers.spec import CaptionerSpec
from teachers.transformers import image_spec

#: Most captions decoded side by side, and most bytes of their caches: bounds on a step's memory whatever the batch.
_ROWS, _CACHE_BYTES = 1024, 4 * 2**30
#: Largest difference from the logits of ``generate``, relative to the largest of them.
_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}
_TRIAL_WORDS = 4


class TransformersCaptioner:
    """A model of transformers as a captioner. Raises ValueError for what the spec or the model has wrong."""

    def __init__(self, spec: CaptionerSpec, accelerator: Accelerator, family: Family, tokenizer: Any) -> None:
        if family.room is not None and spec.max_length > family.room:
            raise ValueError(
                f"max_length {spec.max_length} exceeds the {family.room} tokens that {spec.model} can write"
            )
        self.image, self.captions = family.image, spec.captions
        self._spec, self._accelerator, self._family, self._tokenizer = spec, accelerator, family, tokenizer
        self._rows, size = self._try_out()
        self._rules = DecodingRules(
            start=family.start,
            end=family.ends[0],
            impossible=impossible(tokenizer, family, size).to(accelerator.device),
            min_tokens=spec.min_length,
            max_tokens=spec.max_length - 2,  # start and end count
            repetition_penalty=spec.repetition_penalty,
        )

    @torch.inference_mode()
    def caption(self, pixels: torch.Tensor, seeds: npt.NDArray[np.uint64]) -> list[list[str] | None]:
        """[B, 3, H, W] float32 and seeds [B, captions] -> captions of each image.

        Caption (b, n) is a function of image b and seeds[b, n], up to the rounding of matrix products, which may
        differ with the batch. None for an image whose logits are not finite; ValueError where all images' are.
        """
        if seeds.shape != (len(pixels), self.captions):
            raise ValueError(f"want seeds of shape {(len(pixels), self.captions)}, got {seeds.shape}")
        images = max(1, self._rows // self._spec.rows_per_image)
        texts: list[list[str] | None] = []
        for i in range(0, len(pixels), images):
            rows = self._family.begin(pixels[i : i + images])
            words = decode(rows, self._rules, self._spec, seeds[i : i + images])
            texts += [None if of is None else [self._text(tokens) for tokens in of] for of in words]
        return texts

    def _text(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()

    @torch.inference_mode()
    def _try_out(self) -> tuple[int, int]:
        """Caption a blank image both ways -> how many rows to decode side by side, and the logits of each.

        Raises ValueError where the logits are not those of transformers' own ``generate``: what a cache holds and how
        positions are counted has changed between its versions, and a wrong one still writes fluent captions.
        """
        model, spec, ends = self._family.model, self.image, self._family.ends
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
            for step, logits in enumerate(reference.logits):
                wanted, found = (
                    merge_end_tokens(logits, ends),
                    rows.next_logits(torch.cat([start, words[:, :step]], dim=1)),
                )
                difference = ((found - wanted).abs().max() / wanted.abs().max()).item()
                if not math.isfinite(difference):
                    raise ValueError("its logits are not finite: check the weights, or use `precision: bf16` or `fp32`")
                if difference > _TOLERANCE[self._accelerator.precision]:
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
        chat = Chat(spec, accelerator, model)
        return TransformersCaptioner(spec, accelerator, chat, chat.tokenizer)
    processor = transformers.AutoImageProcessor.from_pretrained(spec.model, trust_remote_code=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec.model, trust_remote_code=False)
    model, image = accelerator.prepare(model.float()), image_spec(processor.to_dict())
    kind: type[Attending | Git] = Git if config["model_type"] == "git" else Attending
    return TransformersCaptioner(spec, accelerator, kind(model, accelerator, image), tokenizer)


def impossible(tokenizer: Any, family: Family, size: int) -> torch.Tensor:
    """bool [size]: outputs that are no word and do not end a text.

    These are special tokens, all ends but the first, markup, and what the tokenizer has no token for.
    """
    mask = torch.arange(size) >= len(tokenizer)
    added = tokenizer.added_tokens_decoder.items()
    markup = {token for token, text in added if text.special or (text.content[0], text.content[-1]) == ("<", ">")}
    mask[[token for token in {family.start, *family.ends, *markup, *tokenizer.all_special_ids} if token < size]] = True
    mask[family.ends[0]] = False
    return mask
