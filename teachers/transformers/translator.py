"""Captioners of transformers that translate the true caption: Marian, M2M100, NLLB, T5 and MADLAD-400.

A translation is what the library's ``generate`` writes, greedily or by beam search. It is a function of the caption
alone, up to the rounding of matrix products, which may depend on the batch.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

from teachers.protocols import NoCaptions
from teachers.runtime.accelerator import GIB, Accelerator, cache_bytes
from teachers.spec import CAPTION
from teachers.tokens import special_token_escaper
from teachers.transformers.captioner import load_network
from teachers.transformers.family import TransformersCaptionerSpec

_PLAIN = "a photo"  # translated where no caption is given, as in a test
_MAX_CACHE_BYTES = 4 * GIB  # on a CPU
_COPIES_OF_LOGITS = 4  # in float32, in a step of ``generate``
_TOKENS = 512  # of the longest caption, where the model has no limit


class Translator:
    """A ``Captioner`` that sees the true caption and no image. Raises ValueError for languages that do not fit."""

    image: Any = None
    reads_captions = True

    def __init__(self, spec: TransformersCaptionerSpec, accelerator: Accelerator, model: Any, tokenizer: Any) -> None:
        self.captions, self._accelerator, self._model, self._tokenizer = spec.captions, accelerator, model, tokenizer
        prefix, forced = choose_languages(tokenizer, spec)
        self._prompt = prefix + (spec.prompt or CAPTION)
        self._escape = special_token_escaper(tokenizer.all_special_tokens)
        positions: int = getattr(model.config, "max_position_embeddings", _TOKENS)
        self._longest = min(positions, tokenizer.model_max_length)
        beams = spec.strategy == "beams"
        self._beams = spec.beams if beams else 1
        model.generation_config.max_new_tokens = None  # would come before ``max_length``
        self._options = {
            "do_sample": False,
            "num_beams": self._beams,
            "num_return_sequences": spec.captions,
            "min_new_tokens": spec.min_length,
            "max_length": spec.max_length,  # with the start and the end
            "repetition_penalty": spec.repetition_penalty,
            **({"length_penalty": spec.length_penalty} if beams else {}),
            **forced,
        }
        # Bytes of keys and values for one token of a row, by translating a text.
        output = self._generate([self._tokenize(_PLAIN)], return_dict_in_generate=True)
        cache = output["cache" if "cache" in output else "past_key_values"]  # renamed by transformers 5
        layers = cache.self_attention_cache.layers
        self._token_bytes = sum(2 * one.keys[0, :, 0].numel() * one.keys.element_size() for one in layers)
        self._bytes = cache_bytes(accelerator.device, _MAX_CACHE_BYTES)

    def caption(self, pixels: Any, seeds: np.ndarray) -> list[list[str] | NoCaptions | None]:
        """``captions`` translations of a test caption for each row of ``seeds``."""
        return self.to_texts(self.generate(pixels, seeds))

    def generate(
        self, pixels: Any, seeds: np.ndarray, captions: Sequence[str | None] | None = None
    ) -> list[list[list[int]] | NoCaptions | None]:
        """The tokens of the translations of B captions, None where logits are not finite.

        Raises ValueError if that happens to all of several captions.
        """
        texts = [_PLAIN] * len(seeds) if captions is None else captions
        found: list[Any] = [NoCaptions("the sample has no true caption") for _ in texts]
        given = [place for place, text in enumerate(texts) if text and text.strip()]
        sources = [self._tokenize(str(texts[place])) for place in given]
        # As many captions at once as caches and logits fit, by the longest of them.
        logits = _COPIES_OF_LOGITS * 4 * self._model.config.vocab_size
        row = logits + self._token_bytes * (max(map(len, sources), default=0) + self._options["max_length"])
        rows = max(1, self._bytes // (row * self._beams))
        for start in range(0, len(given), rows):
            part = sources[start : start + rows]
            finite = _FiniteLogits()
            tokens = self._generate(part, logits_processor=[finite]).view(len(part), self.captions, -1)
            broken = finite.broken.view(len(part), -1).any(1).tolist()
            for place, failed, texts_of_one in zip(given[start : start + rows], broken, tokens.tolist(), strict=True):
                found[place] = None if failed else texts_of_one  # start and padding included
        if len(given) > 1 and all(found[place] is None for place in given):
            raise ValueError("next-token logits are not finite: check the weights, or use `precision: bf16` or `fp32`")
        return found

    def to_texts(self, tokens: Sequence[list[list[int]] | NoCaptions | None]) -> list[list[str] | NoCaptions | None]:
        """Turn the tokens of ``generate`` into texts; needs no accelerator."""
        found: list[list[str] | NoCaptions | None] = []
        for row in tokens:
            if not isinstance(row, list):
                found.append(row)
                continue
            texts = [self._tokenizer.decode(one, skip_special_tokens=True).strip() for one in row]
            good = [text for text in texts if text]  # the places of empty ones repeat the others
            filled = [good[n % len(good)] for n in range(len(texts))] if good else None
            found.append(NoCaptions("the translation is empty") if filled is None else filled)
        return found

    def _tokenize(self, caption: str) -> list[int]:
        text = self._prompt.replace(CAPTION, self._escape(caption))
        tokens: list[int] = self._tokenizer(text, truncation=True, max_length=self._longest)["input_ids"]
        return tokens

    def _generate(self, sources: Sequence[list[int]], **options: Any) -> Any:
        lengths = torch.tensor([len(source) for source in sources])
        padding = self._tokenizer.pad_token_id
        tokens = pad_sequence([torch.tensor(source) for source in sources], batch_first=True, padding_value=padding)
        mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
        put = self._accelerator.put
        with self._accelerator.forward():
            return self._model.generate(input_ids=put(tokens), attention_mask=put(mask), **self._options, **options)


class _FiniteLogits(transformers.LogitsProcessor):
    """Records the rows whose logits have not been finite; changes none."""

    broken: torch.Tensor

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        broken = ~scores.amax(-1).isfinite()
        self.broken = getattr(self, "broken", broken) | broken
        return scores


def load(spec: TransformersCaptionerSpec, accelerator: Accelerator) -> Translator:
    """Load the translator of a spec.

    Raises ValueError for a model that cannot translate, or lacks weights or a package that its tokenizer needs;
    OSError for a model that does not exist.
    """
    _, model = load_network(spec, transformers.AutoModelForSeq2SeqLM)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(spec.model, trust_remote_code=False)
    except ImportError as error:
        raise ValueError(
            f"the tokenizer of {spec.model} needs packages: pip install sentencepiece sacremoses, on every node"
        ) from error
    return Translator(spec, accelerator, accelerator.prepare(model.float()), tokenizer)


def choose_languages(tokenizer: Any, spec: TransformersCaptionerSpec) -> tuple[str, dict[str, Any]]:
    """Choose the languages of a spec -> what precedes each caption, and arguments of ``generate``.

    M2M100 and NLLB name both languages by tokens of the tokenizer, Marian's models of several target languages the
    target by ``>>fra<<`` before the text. Raises ValueError for languages that are absent, unknown or not needed.
    """
    source, target = spec.source_language, spec.target_language
    if hasattr(tokenizer, "src_lang"):
        added = {code: token for code, token in tokenizer.get_added_vocab().items() if "_" in code}
        codes = getattr(tokenizer, "lang_code_to_id", added)
        tokenizer.src_lang = _check_language("source_language", source, codes)
        return "", {"forced_bos_token_id": codes[_check_language("target_language", target, codes)]}
    prefixes = {token[2:-2]: token for token in tokenizer.get_vocab() if token[:2] == ">>" and token[-2:] == "<<"}
    for key, value in (("source_language", source), ("target_language", None if prefixes else target)):
        if value is not None:
            raise ValueError(f"`{key}` is not used: the tokenizer has no tokens of such languages; remove it")
    return (f"{prefixes[_check_language('target_language', target, prefixes)]} " if prefixes else ""), {}


def _check_language(key: str, language: str | None, known: Mapping[str, Any]) -> str:
    """The language, if it is ``known``. Raises ValueError with near names, or the first ones."""
    if language in known:
        return str(language)
    near = difflib.get_close_matches(language or "", known, n=3, cutoff=0.4)
    names = f"{', '.join(near or sorted(known)[:8])}{'' if near or len(known) <= 8 else ', ...'}"
    if language is None:
        raise ValueError(f"`{key}` is missing: name one of the model's {len(known)} languages, such as {names}")
    raise ValueError(f"{key} {language!r} is none of the model's {len(known)} languages; near ones: {names}")
