import math

import numpy as np
import pytest
import torch

from teachers.decoding import decode, greedy, sample
from teachers.describe import describe_captioner
from teachers.rules import DecodingRules
from teachers.spec import CaptionerSpec
from tests.helpers.toy_language import (
    END,
    START,
    VOCABULARY,
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


def spec(strategy: str = "nucleus", **options) -> CaptionerSpec:
    return CaptionerSpec.model_validate({"model": "any", "captions": 3, "strategy": strategy, **options})


def seeds(images: int, captions: int) -> np.ndarray:
    return np.arange(images * captions, dtype=np.uint64).reshape(images, captions)


@pytest.mark.parametrize(("strategy", "options"), STRATEGIES.items(), ids=STRATEGIES)
@pytest.mark.parametrize("how", [rules(), rules(min_tokens=3, repetition_penalty=1.5)], ids=["plain", "penalty"])
def test_captions_are_those_of_the_image_alone_whatever_the_strategy(strategy, options, how):
    made = spec(strategy, **options)
    row_seeds = seeds(len(IMAGES), made.captions)
    together = decode(ToyDecoder(IMAGES), how, made, row_seeds)
    for i, image in enumerate(IMAGES):
        assert decode(ToyDecoder([image]), how, made, row_seeds[i : i + 1]) == [together[i]]
    assert all(how.min_tokens <= len(words) <= how.max_tokens for of_image in together for words in of_image)
    assert all(set(words) <= set(WORDS) for of_image in together for words in of_image)


@pytest.mark.parametrize("strategy", ["nucleus", "top_k"])
def test_seeds_decide_where_words_are_drawn(strategy):
    made, row_seeds = spec(strategy, **STRATEGIES[strategy]), seeds(len(IMAGES), 3)
    found = decode(ToyDecoder(IMAGES), rules(), made, row_seeds)
    assert decode(ToyDecoder(IMAGES), rules(), made, row_seeds[:, ::-1]) == [texts[::-1] for texts in found]
    assert decode(ToyDecoder(IMAGES), rules(), made, row_seeds + np.uint64(1000)) != found


@pytest.mark.parametrize("strategy", ["greedy", "beams", "diverse_beams"])
def test_seeds_decide_nothing_where_nothing_is_drawn(strategy):
    made = spec(strategy, **STRATEGIES[strategy])
    row_seeds = seeds(len(IMAGES), made.captions)
    found = decode(ToyDecoder(IMAGES), rules(), made, row_seeds)
    assert decode(ToyDecoder(IMAGES), rules(), made, row_seeds + np.uint64(1000)) == found


def test_greedy_takes_the_likeliest_word_each_time():
    how = rules(min_tokens=2, max_tokens=6, repetition_penalty=1.4)
    found = decode(ToyDecoder(IMAGES), how, spec("greedy", captions=1), seeds(len(IMAGES), 1))
    for image, [words] in zip(IMAGES, found, strict=True):
        path: list[int] = []
        while len(path) < 6 and (best := int(np.argmax(log_probabilities(image, path, how)))) != END:
            path.append(best)
        assert words == path


def test_whole_captions_are_distributed_as_the_model_has_them():
    """Of all 40 texts of at most 3 words, 20,000 draws, by a chi-square test."""
    how, count = rules(min_tokens=0, max_tokens=3), 20_000
    made = spec(captions=50, top_p=1.0)
    drawn = decode(ToyDecoder([11] * (count // 50)), how, made, seeds(count // 50, 50))
    found: dict[tuple[int, ...], int] = {}
    for words in (words for of_image in drawn for words in of_image):
        found[tuple(words)] = found.get(tuple(words), 0) + 1
    expected = {tuple(words): count * math.exp(total) for words, total in all_texts(11, how)}
    assert abs(sum(expected.values()) - count) < 1e-6 * count
    assert set(found) <= set(expected)
    chi_square = sum((found.get(words, 0) - n) ** 2 / n for words, n in expected.items())
    assert chi_square < 72.1  # 39 degrees, p = 0.001


def test_an_image_has_one_row_until_a_word_is_drawn_and_rows_leave_as_they_end():
    forward = ToyDecoder(IMAGES)
    texts = sample(forward, rules(), greedy, torch.ones(len(IMAGES), 3, 4))
    lengths = [len(words) for of_image in texts for words in of_image]
    assert forward.steps == [len(IMAGES), *(sum(length >= step for length in lengths) for step in (1, 2, 3))]


def test_an_image_whose_logits_are_not_finite_has_no_captions_and_its_neighbours_have_theirs():
    class Broken(ToyDecoder):
        def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
            logits = super().next_logits(tokens)
            logits[torch.tensor([image == 22 and words[1:] == [1] for image, words in self._rows])] = torch.inf
            return logits

    made = spec(temperature=3.0, top_p=1.0)
    whole = decode(ToyDecoder(IMAGES), rules(2), made, seeds(len(IMAGES), 3))
    found = decode(Broken(IMAGES), rules(2), made, seeds(len(IMAGES), 3))
    assert any(words[0] == 1 for words in whole[2])
    assert found == [*whole[:2], None, *whole[3:]]


@pytest.mark.parametrize("strategy", ["nucleus", "beams"])
def test_a_model_whose_logits_are_never_finite_is_an_error(strategy):
    class Broken(ToyDecoder):
        def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().next_logits(tokens).fill_(torch.nan)

    with pytest.raises(ValueError, match="not finite: check the weights, or use `precision: bf16`"):
        decode(Broken(IMAGES), rules(), spec(strategy), seeds(len(IMAGES), 3))
    assert decode(Broken([20]), rules(), spec(strategy), seeds(1, 3)) == [None]


def test_the_rules_bar_and_penalise_as_they_say():
    how = DecodingRules(START, END, torch.arange(VOCABULARY) == START, 2, 4, repetition_penalty=2.0)
    logits = torch.tensor([[1.0, -1.0, 3.0, 9.0, 5.0]])
    tokens = torch.tensor([[START, 0, 1, 1]])
    assert how.apply(logits, tokens).tolist() == [[0.5, -2.0, 3.0, -math.inf, 5.0]]
    assert how.apply(logits, tokens[:, :2]).tolist() == [[0.5, -1.0, 3.0, -math.inf, -math.inf]]
    assert logits[0, 3] == 9.0


def test_the_toy_language_is_what_the_tests_think():
    assert torch.equal(logits_of(1, [0, 2]), logits_of(1, [0, 2]))
    assert not torch.equal(logits_of(1, [0, 2]), logits_of(2, [0, 2]))
    assert not torch.equal(logits_of(1, [0, 2]), logits_of(1, [2, 0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "beams", "top_k": 5}, "`top_k` is not used by strategy beams: .* `strategy` to top_k"),
        ({"top_k": 5}, "`top_k` is not used by strategy nucleus"),
        ({"strategy": "top_k", "top_p": 0.5}, "`top_p` is not used by strategy top_k: .* nucleus"),
        ({"strategy": "greedy", "captions": 1, "temperature": 0.5}, "to nucleus or top_k"),
        ({"strategy": "beams", "groups": 2}, "`groups` is not used by strategy beams: .* diverse_beams"),
        ({"strategy": "greedy"}, "one caption per image: set `captions: 1`"),
        ({"strategy": "beams", "captions": 8}, "`captions: 8` exceeds `beams: 6`: set `beams` to 8"),
        ({"strategy": "diverse_beams", "beams": 8}, "8 beams cannot be divided among 3 groups"),
    ],
)
def test_fields_that_do_not_go_together_are_an_error_that_says_how_to_mend_it(options, message):
    with pytest.raises(ValueError, match=message):
        CaptionerSpec.model_validate({"model": "any", **options})


def test_what_decides_the_words_is_told_and_what_was_added_later_only_where_it_is_used():
    lengths = {"min_length": 5, "max_length": 30}
    assert spec(captions=5).decoding() == {"captions": 5, "temperature": 1.0, "top_p": 0.9, **lengths}
    assert spec("greedy", captions=1, repetition_penalty=1.2, compile=True).decoding() == {
        "captions": 1,
        "strategy": "greedy",
        "repetition_penalty": 1.2,
        **lengths,
    }
    beams = {"strategy": "beams", "captions": 3, "beams": 6, "length_penalty": 1.0}
    assert spec("beams").decoding() == {**beams, **lengths}


def test_only_coca_is_compiled():
    made = CaptionerSpec.model_validate({"model": "any", "family": "transformers", "compile": True})
    with pytest.raises(ValueError, match="captioner blip: `compile` works only with CoCa"):
        describe_captioner("blip", made)
