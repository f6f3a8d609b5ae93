"""A tokenizer of open_clip that can be sent to other processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Tokenizer:
    """The tokenizer of an open_clip model by the model's name. Special tokens within texts are plain text.

    It is loaded at the first call in each process, so it pickles small. ``context`` replaces the context of the model.
    """

    def __init__(self, model: str, context: int | None = None) -> None:
        self.model, self.context = model, context
        self._tokenizer: Any = None

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """B texts -> int64 [B, context length]."""
        import open_clip

        from teachers.open_clip.text import disable_special_tokens

        if self._tokenizer is None:
            self._tokenizer = disable_special_tokens(open_clip.get_tokenizer(self.model, self.context))
        tokens: torch.Tensor = self._tokenizer(list(texts))
        return tokens

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_tokenizer": None}
