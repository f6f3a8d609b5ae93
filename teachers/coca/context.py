"""The context of a CoCa: how many tokens its text tower and its decoder take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


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
