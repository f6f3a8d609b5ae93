"""Tokens of recent batches of texts, for teachers that share a tokenizer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

#: Batches to keep: those of the row groups in work, since each teacher encodes all texts of a row group in turn.
_MAX_BATCHES = 64


class TokenCache:
    """The tokens of the last batches, by tokenizer and texts."""

    def __init__(self) -> None:
        self._tokens: OrderedDict[tuple[Hashable, tuple[str, ...]], Any] = OrderedDict()

    def get(self, tokenizer: Hashable | None, texts: Sequence[str], tokenize: Callable[[Sequence[str]], Any]) -> Any:
        """The tokens of a batch; nothing is kept for ``tokenizer`` None, which equals no other."""
        if tokenizer is None:
            return tokenize(texts)
        entry = (tokenizer, tuple(texts))
        if entry not in self._tokens:
            self._tokens[entry] = tokenize(texts)
            if len(self._tokens) > _MAX_BATCHES:
                self._tokens.popitem(last=False)
        self._tokens.move_to_end(entry)
        return self._tokens[entry]
