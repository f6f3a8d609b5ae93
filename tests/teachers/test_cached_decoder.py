"""Decoding on the cache of a transformers model, compared with full forward passes of the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from teachers.device.accelerator import Accelerator
from teachers.transformers.cached_decoder import CachedDecoder, merge_end_tokens


@pytest.fixture(scope="module")
def model(captioner_folder: Callable[[str], Path]) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(captioner_folder("git")).eval()


def _pixels(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _decoder(model: Any, pixels: torch.Tensor) -> CachedDecoder:
    prompt = {"input_ids": torch.full((len(pixels), 1), 1), "pixel_values": pixels}
    return CachedDecoder(model, Accelerator("cpu"), prompt, (2,), positions=(1, ()))


def test_logits_match_the_full_forward_pass_while_rows_are_repeated_and_dropped(model: Any) -> None:
    pixels, tokens = _pixels(2), torch.tensor([[1], [1]])
    decoder = _decoder(model, pixels)
    for rows, new in (([0, 0, 1], [5, 9, 7]), ([2, 0], [8, 11]), ([0, 1], [6, 6])):
        with torch.inference_mode():
            expected = model(input_ids=tokens, pixel_values=pixels).logits[:, -1]
        torch.testing.assert_close(decoder.next_logits(tokens), expected, rtol=1e-4, atol=1e-4)
        decoder.select_rows(torch.tensor(rows))
        pixels, tokens = pixels[rows], torch.cat([tokens[rows], torch.tensor(new)[:, None]], dim=1)


def test_row_bytes_grow_by_the_keys_and_values_of_a_token(model: Any) -> None:
    decoder = _decoder(model, _pixels(1))
    before = decoder.row_bytes()
    decoder.next_logits(torch.tensor([[1, 5]]))
    config = model.config
    assert decoder.row_bytes() - before == config.num_hidden_layers * 2 * config.hidden_size * 4


def test_merged_end_tokens_have_their_total_probability() -> None:
    logits = torch.tensor([[0.5, 1.0, -2.0, 3.0]])
    probabilities = logits.softmax(-1)[0]
    merged = merge_end_tokens(logits.clone(), (1, 3))[0]
    share = merged[[0, 1, 2]].softmax(-1)  # token 3 is counted in token 1
    torch.testing.assert_close(share, torch.stack([probabilities[0], probabilities[[1, 3]].sum(), probabilities[2]]))
    assert torch.equal(merge_end_tokens(logits, (2,)), logits)
