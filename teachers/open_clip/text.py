"""Text encoder of an open_clip model: trims batches to their longest text, and reads special tokens as plain text.

Both use parts of open_clip that its releases may change, so both are compared with open_clip's own way when a model is
loaded, and left out with a warning where they differ or raise.
"""

from __future__ import annotations

import copy
import html
import json
import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import open_clip
import torch

from teachers.open_clip import building  # noqa: F401  (whoever tokenizes for a model finds it by name)
from teachers.open_clip.catalog import model_config
from teachers.runtime.accelerator import Accelerator
from teachers.tokens import PROBE_TEXTS, special_token_escaper, trimming_is_exact

_LOG = logging.getLogger(__name__)
#: Special tokens of a tokenizer that does not state them.
_SPECIAL = ("<start_of_text>", "<end_of_text>", "<|startoftext|>", "<|endoftext|>", "<s>", "</s>", "<pad>", "<mask>")

#: Limit of the token cache in words, since workers and loader processes run for days.
_MAX_CACHED_WORDS = 200_000
_own_tokenizers: dict[str, Any] = {}  # open_clip's own, as it makes them, by what its constructor takes


class TextEncoder:
    """Tokenizes and encodes texts for a model that is already on its device.

    A causal text tower that pools at the end token ignores later positions, so a batch is cut to its longest text.
    The constructor checks this against the full length on a few texts. Other towers (bidirectional, with a class
    token, of another library) get texts of full length.
    """

    def __init__(self, model: Any, tokenizer: Any, accelerator: Accelerator) -> None:
        self._model = model
        self._accelerator = accelerator
        self.tokenizer_key = _tokenizer_key(tokenizer)
        self._tokenizer = disable_special_tokens(tokenizer)
        try:
            self._trims = _can_trim(model) and trimming_is_exact(
                lambda texts, trim: self.encode(self.tokenize(texts), trim)
            )
        except Exception as error:  # of an open_clip with other text towers
            _left_out("trimming of texts", error)
            self._trims = False

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """B strings -> int64 [B, context length]."""
        tokens: torch.Tensor = self._tokenizer(list(texts))
        return tokens

    def encode(self, tokens: torch.Tensor, trim: bool | None = None) -> torch.Tensor:
        """Tokens [B, context length] -> [B, dim], not normalized. Call it inside ``Accelerator.forward``.

        With ``trim``, by default if that is exact, embeddings and mask are cut at the last pooled position.
        """
        if not (self._trims if trim is None else trim):
            features: torch.Tensor = self._model.encode_text(self._accelerator.put(tokens))
            return features
        from open_clip.transformer import text_global_pool

        if isinstance(self._model, open_clip.CLIP):
            tower: Any = self._model
            pool_type, end_id = tower.text_pool_type, tower.text_eos_id
        else:
            tower = self._model.text
            pool_type, end_id = tower.pool_type, tower.eos_id
        ends = tokens if pool_type == "argmax" else torch.eq(tokens, -1 if end_id is None else end_id).int()
        length = int(ends.argmax(dim=-1).max()) + 1
        tokens = self._accelerator.put(tokens[:, :length].contiguous())
        dtype = tower.transformer.get_cast_dtype()
        x = tower.token_embedding(tokens).to(dtype) + tower.positional_embedding[:length].to(dtype)
        x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:length, :length]))
        x = text_global_pool(x, tokens, pool_type, eos_token_id=end_id)
        projection = tower.text_projection
        if projection is None:
            return x
        result: torch.Tensor = projection(x) if isinstance(projection, torch.nn.Linear) else x @ projection
        return result


def _left_out(what: str, error: Exception) -> None:
    _LOG.warning(
        "%s is left out: this code does not know the insides of open_clip %s (%s: %s)",
        what, open_clip.__version__, type(error).__name__, error,
    )  # fmt: skip


def _tokenizer_key(tokenizer: Any) -> Hashable | None:
    """A value that is equal for tokenizers with equal tokens; None for all but open_clip's own."""
    if type(tokenizer) is not open_clip.SimpleTokenizer or getattr(tokenizer, "reduction_fn", None) is not None:
        return None
    try:
        vocabulary = hash(frozenset(tokenizer.encoder.items()))
        return vocabulary, tuple(tokenizer.all_special_ids), tokenizer.context_length, tokenizer.clean_fn
    except AttributeError:
        return None


def tokenizer_of(model: str, context: int | None = None) -> Any:
    """open_clip's tokenizer of a model by its name; ``context`` replaces the context of the model.

    open_clip's own vocabulary, which takes a tenth of a second, is read once in each process: tokenizers share it.
    Raises ValueError, OSError or ImportError if the tokenizer cannot be loaded.
    """
    try:
        config = model_config(model)
    except (ValueError, OSError):  # open_clip says what is wrong
        config = None
    text = (config or {}).get("text_cfg") or {}
    if not text or text.get("hf_tokenizer_name") or "siglip" in model.lower():  # with files of their own
        return open_clip.get_tokenizer(model, context)
    key = json.dumps([context or text.get("context_length"), text.get("tokenizer_kwargs")], sort_keys=True)
    if key not in _own_tokenizers:
        _own_tokenizers[key] = open_clip.get_tokenizer(model, context)
    tokenizer = copy.copy(_own_tokenizers[key])
    tokenizer.cache = {**tokenizer.cache}
    return tokenizer


def disable_special_tokens(tokenizer: Any) -> Any:
    """Modify a tokenizer in place so that it reads special tokens in texts as plain text, and return it.

    open_clip's own tokenizer also gets faster. Special tokens are escaped after open_clip's cleaning, which turns
    ``&lt;end_of_text&gt;`` into ``<end_of_text>``. A tokenizer without ``clean_fn`` is left as it is: open_clip's only
    one strips all punctuation. Where that does not give the tokens of the original, texts are escaped before it.
    """
    original = copy.copy(tokenizer)
    special: Sequence[str] = _SPECIAL
    try:
        from open_clip.tokenizer import get_clean_fn

        clean, is_simple = getattr(tokenizer, "clean_fn", None), isinstance(tokenizer, open_clip.SimpleTokenizer)
        if clean is None:
            if is_simple or isinstance(tokenizer, open_clip.tokenizer.HFTokenizer):  # which clean by ``clean_fn``
                raise AttributeError("a tokenizer has no clean_fn")
            special = []
        elif is_simple:
            special = [tokenizer.decoder[index] for index in tokenizer.all_special_ids]
            tokenizer.encode = _cached_encode(tokenizer)
        else:
            special = list(tokenizer.tokenizer.all_special_tokens)
        if clean is not None:
            clean = clean_text if clean is get_clean_fn("lower") else clean
            escape = special_token_escaper(special)
            tokenizer.clean_fn = lambda text: escape(clean(text))
        plain = list(PROBE_TEXTS)
        if not torch.equal(tokenizer(plain), original(plain)):
            raise ValueError("it would have other tokens")
        for token in special:
            if len(token) > 1 and not torch.equal(tokenizer([token]), tokenizer([f"{token[0]} {token[1:]}"])):
                raise ValueError(f"it would read {token} in a text as the token")
        return tokenizer
    except Exception as error:  # of an open_clip with other tokenizers
        _left_out("fast tokenization", error)
        return _EscapedBefore(original, special)


class _EscapedBefore:
    """A tokenizer that gets texts in which special tokens are escaped, after HTML entities are resolved."""

    def __init__(self, tokenizer: Any, special: Sequence[str]) -> None:
        self._tokenizer, self._escape = tokenizer, special_token_escaper(special)

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Any:
        texts = [texts] if isinstance(texts, str) else texts
        plain = [self._escape(html.unescape(html.unescape(text))) for text in texts]
        return self._tokenizer(plain) if context_length is None else self._tokenizer(plain, context_length)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # before it has a tokenizer, such as in a copy
            raise AttributeError(name)
        return getattr(self._tokenizer, name)


def _cached_encode(tokenizer: open_clip.SimpleTokenizer) -> Callable[[str], list[int]]:
    """Return its ``encode`` function with a cache of the tokens of each word."""
    cache: dict[str, list[int]] = {}

    def encode(text: str) -> list[int]:
        tokens: list[int] = []
        for word in tokenizer.pat.findall(tokenizer.clean_fn(text)):
            if word not in cache:
                if len(cache) == _MAX_CACHED_WORDS:
                    cache.clear()
                    tokenizer.cache.clear()  # open_clip's own cache has no limit
                units = "".join(tokenizer.byte_encoder[byte] for byte in word.encode())
                cache[word] = [tokenizer.encoder[unit] for unit in tokenizer.bpe(units).split(" ")]
            tokens += cache[word]
        return tokens

    return encode


def clean_text(text: str) -> str:
    """Clean a text as open_clip does, skipping ftfy and HTML unescaping where they would change nothing."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return " ".join(text.split()).lower()
    from open_clip.tokenizer import get_clean_fn

    cleaned: str = get_clean_fn("lower")(text)
    return cleaned


def keep_residual_in_float32(model: torch.nn.Module) -> None:
    """Let the text tower add up its residuals in float32, also when its matrices are in a lower precision.

    open_clip takes the data type of the embedded tokens from a matrix.
    """
    for module in model.modules():
        if hasattr(module, "get_cast_dtype"):
            module.get_cast_dtype = lambda: torch.float32  # type: ignore[assignment, unused-ignore]


def _can_trim(model: torch.nn.Module) -> bool:
    """Whether the text tower is causal and pools at a position that it finds in the tokens."""
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


class Tokenizer:
    """The tokenizer of an open_clip model by the model's name. Special tokens within texts are plain text.

    It is loaded at the first call in each process, so it pickles small. ``context`` replaces the context of the model.
    """

    def __init__(self, model: str, context: int | None = None) -> None:
        self.model, self.context = model, context
        self._tokenizer: Any = None

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """B texts -> int64 [B, context length]."""
        if self._tokenizer is None:
            self._tokenizer = disable_special_tokens(tokenizer_of(self.model, self.context))
        tokens: torch.Tensor = self._tokenizer(list(texts))
        return tokens

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_tokenizer": None}
