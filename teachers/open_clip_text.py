"""The text side of an open_clip model: tokens only as long as the batch needs, and texts that stay texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import get_clean_fn
from open_clip.transformer import text_global_pool

from teachers.device import Accelerator
from teachers.special_tokens import special_token_escaper
from teachers.trimming import trimming_is_exact

#: Words that may be remembered: workers and loader processes live for days.
_REMEMBERED_WORDS = 200_000


class TextEncoder:
    """Tokenizes and encodes texts for one model, which is prepared on its device already.

    A causal text tower that reads the embedding at the end token sees nothing behind it, so a batch need only be
    as long as its longest text. That is checked against the full length on a few texts here; towers where it does
    not hold (bidirectional, with a class token, from another library) are given the full length.
    """

    def __init__(self, model: Any, tokenizer: Any, device: Accelerator) -> None:
        self._model = model
        self._device = device
        self._tokenizer = disable_special_tokens(tokenizer)
        self._trims = _can_trim(model) and trimming_is_exact(
            lambda texts, trim: self._encode(self.tokenize(texts), trim)
        )

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [B, context length] -> [B, dim], not normalised. Call inside ``Accelerator.forward``."""
        return self._encode(tokens, trim=self._trims)

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """B strings -> int64 [B, context length]."""
        tokens: torch.Tensor = self._tokenizer(list(texts))
        return tokens

    def _encode(self, tokens: torch.Tensor, trim: bool) -> torch.Tensor:
        if trim:
            tower = _tower(self._model)
            end = int(_pooled_positions(tower, tokens).max()) + 1
            return _encode_trimmed(tower, self._device.put(tokens[:, :end].contiguous()))
        features: torch.Tensor = self._model.encode_text(self._device.put(tokens))
        return features


def disable_special_tokens(tokenizer: Any) -> Any:
    """Make the tokenizer read special tokens in captions as plain text, and return it; open_clip's own gets faster.

    Special tokens are looked for after cleaning, which turns ``&lt;end_of_text&gt;`` into ``<end_of_text>``. The one
    tokenizer without a cleaning function to extend strips all punctuation.
    """
    clean = getattr(tokenizer, "clean_fn", None)
    if clean is None:
        return tokenizer
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        special = [tokenizer.decoder[index] for index in tokenizer.all_special_ids]
        tokenizer.encode = _remembering(tokenizer)
    else:
        special = list(tokenizer.tokenizer.all_special_tokens)
    if clean is get_clean_fn("lower"):
        clean = clean_text
    neutralise = special_token_escaper(special)
    tokenizer.clean_fn = lambda text: neutralise(clean(text))
    return tokenizer


def _remembering(tokenizer: open_clip.SimpleTokenizer) -> Callable[[str], list[int]]:
    """Its ``encode``, which works out the tokens of a word only when it first comes."""
    known: dict[str, list[int]] = {}

    def encode(text: str) -> list[int]:
        tokens: list[int] = []
        for word in tokenizer.pat.findall(tokenizer.clean_fn(text)):
            if word not in known:
                if len(known) == _REMEMBERED_WORDS:
                    known.clear()
                    tokenizer.cache.clear()  # which keeps every word it ever saw
                units = "".join(tokenizer.byte_encoder[byte] for byte in word.encode())
                known[word] = [tokenizer.encoder[unit] for unit in tokenizer.bpe(units).split(" ")]
            tokens += known[word]
        return tokens

    return encode


def clean_text(text: str) -> str:
    """open_clip's cleaning, without ftfy and unescaping where they find nothing to do."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return " ".join(text.split()).lower()
    cleaned: str = get_clean_fn("lower")(text)
    return cleaned


def _tower(model: torch.nn.Module) -> Any:
    return model if isinstance(model, open_clip.CLIP) else model.text


def _can_trim(model: torch.nn.Module) -> bool:
    """Whether the text tower is causal and pools at a position it finds in the tokens."""
    if isinstance(model, open_clip.CLIP):
        return model.attn_mask is not None and model.text_pool_type in ("argmax", "eos")
    tower = getattr(model, "text", None)
    return (
        isinstance(tower, open_clip.transformer.TextTransformer)
        and not isinstance(model, open_clip.CoCa)
        and tower.attn_mask is not None
        and tower.cls_emb is None
        and tower.pool_type in ("argmax", "eos")
    )


def _pooling(tower: Any) -> tuple[str, int | None]:
    if isinstance(tower, open_clip.CLIP):
        return tower.text_pool_type, tower.text_eos_id
    return tower.pool_type, tower.eos_id


def _pooled_positions(tower: Any, tokens: torch.Tensor) -> torch.Tensor:
    """[B, L] -> [B], by the same rule that pools the embedding."""
    pool_type, end_id = _pooling(tower)
    return (
        tokens.argmax(dim=-1)
        if pool_type == "argmax"
        else torch.eq(tokens, -1 if end_id is None else end_id).int().argmax(dim=-1)
    )


def _encode_trimmed(tower: Any, tokens: torch.Tensor) -> torch.Tensor:
    """open_clip's text forward with position embeddings and mask cut to the tokens' length."""
    length = tokens.shape[1]
    dtype = tower.transformer.get_cast_dtype()
    x = tower.token_embedding(tokens).to(dtype) + tower.positional_embedding[:length].to(dtype)
    x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:length, :length]))
    pool_type, end_id = _pooling(tower)
    x = text_global_pool(x, tokens, pool_type, eos_token_id=end_id)
    projection = tower.text_projection
    if projection is None:
        return x
    result: torch.Tensor = projection(x) if isinstance(projection, torch.nn.Linear) else x @ projection
    return result
