"""Decoding strategies on a toy language."""

import math

import numpy as np
import pytest
import torch

from teachers.decoding.choosing import greedy
from teachers.decoding.decode import decode, sample
from teachers.registry import captioner_spec
from teachers.spec import CaptionerSpec
from tests.helpers.toy_language import (
    END,
    WORDS,
    ToyDecoder,
    all_texts,
    log_probabilities,
    logits_of,
    rules,
)

IMAGES = tuple(range(20, 32))
STRATEGIES = {
    "nucleus": {"top_p": 0.8},
    "top_k": {"top_k": 2},
    "greedy": {"captions": 1},
    "beams": {"beams": 3},
    "diverse_beams": {"beams": 4, "groups": 2},
}


def make_spec(strategy: str = "nucleus", **options) -> CaptionerSpec:
    return captioner_spec(**{"model": "any", "captions": 3, "strategy": strategy, **options})


def seeds(images: int, captions: int) -> np.ndarray:
    return np.arange(images * captions, dtype=np.uint64).reshape(images, captions)


@pytest.mark.parametrize(("strategy", "options"), STRATEGIES.items(), ids=STRATEGIES)
@pytest.mark.parametrize(
    "decoding_rules", [rules(), rules(min_tokens=3, repetition_penalty=1.5)], ids=["plain", "penalty"]
)
def test_captions_do_not_depend_on_the_batch_for_any_strategy(strategy, options, decoding_rules):
    spec = make_spec(strategy, **options)
    row_seeds = seeds(len(IMAGES), spec.captions)
    together = decode(ToyDecoder(IMAGES), decoding_rules, spec, row_seeds)
    for i, image in enumerate(IMAGES):
        assert decode(ToyDecoder([image]), decoding_rules, spec, row_seeds[i : i + 1]) == [together[i]]
    assert all(
        decoding_rules.min_tokens <= len(words) <= decoding_rules.max_tokens
        for of_image in together
        for words in of_image
    )
    assert all(set(words) <= set(WORDS) for of_image in together for words in of_image)


@pytest.mark.parametrize("strategy", ["nucleus", "top_k"])
def test_seeds_determine_sampled_captions(strategy):
    spec, row_seeds = make_spec(strategy, **STRATEGIES[strategy]), seeds(len(IMAGES), 3)
    found = decode(ToyDecoder(IMAGES), rules(), spec, row_seeds)
    assert decode(ToyDecoder(IMAGES), rules(), spec, row_seeds[:, ::-1]) == [texts[::-1] for texts in found]
    assert decode(ToyDecoder(IMAGES), rules(), spec, row_seeds + np.uint64(1000)) != found


@pytest.mark.parametrize("strategy", ["greedy", "beams", "diverse_beams"])
def test_seeds_do_not_affect_strategies_without_sampling(strategy):
    spec = make_spec(strategy, **STRATEGIES[strategy])
    row_seeds = seeds(len(IMAGES), spec.captions)
    found = decode(ToyDecoder(IMAGES), rules(), spec, row_seeds)
    assert decode(ToyDecoder(IMAGES), rules(), spec, row_seeds + np.uint64(1000)) == found


def test_greedy_chooses_the_most_probable_token():
    decoding_rules = rules(min_tokens=2, max_tokens=6, repetition_penalty=1.4)
    found = decode(ToyDecoder(IMAGES), decoding_rules, make_spec("greedy", captions=1), seeds(len(IMAGES), 1))
    for image, [words] in zip(IMAGES, found, strict=True):
        path: list[int] = []
        while len(path) < 6 and (best := int(np.argmax(log_probabilities(image, path, decoding_rules)))) != END:
            path.append(best)
        assert words == path


def test_sampled_captions_follow_the_models_distribution():
    """A chi-square test over all 40 texts of at most 3 tokens with 20,000 samples."""
    decoding_rules, count = rules(min_tokens=0, max_tokens=3), 20_000
    spec = make_spec(captions=50, top_p=1.0)
    drawn = decode(ToyDecoder([11] * (count // 50)), decoding_rules, spec, seeds(count // 50, 50))
    found: dict[tuple[int, ...], int] = {}
    for words in (words for of_image in drawn for words in of_image):
        found[tuple(words)] = found.get(tuple(words), 0) + 1
    expected = {tuple(words): count * math.exp(total) for words, total in all_texts(11, decoding_rules)}
    assert abs(sum(expected.values()) - count) < 1e-6 * count
    assert set(found) <= set(expected)
    chi_square = sum((found.get(words, 0) - n) ** 2 / n for words, n in expected.items())
    assert chi_square < 72.1  # 39 degrees, p = 0.001


def test_captions_share_a_row_until_the_first_token_and_ended_rows_leave_the_batch():
    forward = ToyDecoder(IMAGES)
    texts = sample(forward, rules(), greedy, torch.ones(len(IMAGES), 3, 4))
    lengths = [len(words) for of_image in texts for words in of_image]
    assert forward.steps == [len(IMAGES), *(sum(length >= step for length in lengths) for step in (1, 2, 3))]


def test_an_image_with_non_finite_logits_gives_none_without_affecting_others():
    class Broken(ToyDecoder):
        def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
            logits = super().next_logits(tokens)
            logits[torch.tensor([image == 22 and words[1:] == [1] for image, words in self._rows])] = torch.inf
            return logits

    spec = make_spec(temperature=3.0, top_p=1.0)
    whole = decode(ToyDecoder(IMAGES), rules(2), spec, seeds(len(IMAGES), 3))
    found = decode(Broken(IMAGES), rules(2), spec, seeds(len(IMAGES), 3))
    assert any(words[0] == 1 for words in whole[2])
    assert found == [*whole[:2], None, *whole[3:]]


@pytest.mark.parametrize("strategy", ["nucleus", "beams"])
def test_non_finite_logits_for_all_images_are_an_error(strategy):
    class Broken(ToyDecoder):
        def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().next_logits(tokens).fill_(torch.nan)

    with pytest.raises(ValueError, match="not finite: check the weights, or use `precision: bf16`"):
        decode(Broken(IMAGES), rules(), make_spec(strategy), seeds(len(IMAGES), 3))
    assert decode(Broken([20]), rules(), make_spec(strategy), seeds(1, 3)) == [None]


def test_toy_logits_depend_on_the_image_and_on_all_tokens():
    assert torch.equal(logits_of(1, [0, 2]), logits_of(1, [0, 2]))
    assert not torch.equal(logits_of(1, [0, 2]), logits_of(2, [0, 2]))
    assert not torch.equal(logits_of(1, [0, 2]), logits_of(1, [2, 0]))
