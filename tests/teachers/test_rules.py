"""Decoding rules and the order of the remaining rows."""

from __future__ import annotations

import math

import numpy as np
import torch

from teachers.decoding.rules import DecodingRules, compact
from tests.helpers.toy_language import (
    END,
    START,
    VOCABULARY,
)


def test_rules_mask_impossible_tokens_and_apply_the_repetition_penalty():
    decoding_rules = DecodingRules(START, END, torch.arange(VOCABULARY) == START, 2, 4, repetition_penalty=2.0)
    logits = torch.tensor([[1.0, -1.0, 3.0, 9.0, 5.0]])
    tokens = torch.tensor([[START, 0, 1, 1]])
    assert decoding_rules.apply(logits, tokens).tolist() == [[0.5, -2.0, 3.0, -math.inf, 5.0]]
    assert decoding_rules.apply(logits, tokens[:, :2]).tolist() == [[0.5, -1.0, 3.0, -math.inf, -math.inf]]
    assert logits[0, 3] == 9.0


def test_compact_moves_rows_only_to_fill_gaps():
    for seed in range(200):
        going = np.random.default_rng(seed).random(seed % 13) < 0.6
        order = compact(going)
        assert sorted(order) == np.flatnonzero(going).tolist()
        stay = going[: len(order)]
        assert (order[stay] == np.flatnonzero(stay)).all()
