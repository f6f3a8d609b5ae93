"""Beam search compared with enumeration and with a reference implementation."""

import itertools

import pytest
import torch

from teachers.decoding.beams import BeamOptions, beam_search
from teachers.decoding.rules import DecodingRules
from tests.helpers.toy_language import END, WORDS, ToyDecoder, all_texts, log_probabilities, rules

IMAGES = (11, 12, 13, 14)


def score(words: list[int], total: float, beams: BeamOptions) -> float:
    return total / (len(words) + 1) ** beams.length_penalty


def brute_force(image: int, decoding_rules: DecodingRules, beams: BeamOptions, captions: int) -> list[list[int]]:
    ranked = sorted(all_texts(image, decoding_rules), key=lambda text: -score(*text, beams))
    return [words for words, _ in ranked[:captions]]


def reference_search(
    image: int, decoding_rules: DecodingRules, beams: BeamOptions
) -> list[list[tuple[float, list[int]]]]:
    """Beam search by its definition, for one image, without early stopping.

    Returns each group's best texts with their scores.
    """
    growing: list[list[tuple[float, list[int]]]] = [[(0.0, [])] for _ in range(beams.groups)]
    ended: list[list[tuple[float, list[int]]]] = [[] for _ in range(beams.groups)]
    size = beams.beams // beams.groups
    for _ in range(decoding_rules.max_tokens):
        taken: list[int] = []
        for group in range(beams.groups):
            grown = []
            for total, words in growing[group]:
                log_p = log_probabilities(image, words, decoding_rules)
                ended[group].append((score(words, total + log_p[END], beams), words))
                grown += [(total + log_p[word], [*words, word]) for word in WORDS]
            grown.sort(key=lambda text: -(text[0] - beams.diversity * taken.count(text[1][-1])))
            growing[group] = grown[:size]
            taken += [words[-1] for _, words in growing[group]]
    for group in range(beams.groups):
        ended[group] += [(score(words, total, beams), words) for total, words in growing[group]]
    best = [sorted(texts, key=lambda text: -text[0])[:size] for texts in ended]
    return [[text for text in texts if text[0] > -torch.inf] for texts in best]


def best_of_groups(groups: list[list[tuple[float, list[int]]]]) -> list[list[int]]:
    """The best text of each group, then the second best of each, and so on, without repetition."""
    ranks = itertools.zip_longest(*groups)
    texts = [words for rank in ranks for _, words in sorted((t for t in rank if t), key=lambda text: -text[0])]
    return [list(words) for words in dict.fromkeys(map(tuple, texts))]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5, -0.7])
@pytest.mark.parametrize(
    "decoding_rules", [rules(), rules(min_tokens=3), rules(min_tokens=0, repetition_penalty=1.8)], ids=repr
)
def test_unlimited_beams_find_the_best_of_all_texts(decoding_rules, length_penalty):
    beams = BeamOptions(beams=81, length_penalty=length_penalty)
    found = beam_search(ToyDecoder(IMAGES), decoding_rules, len(IMAGES), 6, beams)
    assert found == [brute_force(image, decoding_rules, beams, 6) for image in IMAGES]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -0.7])
@pytest.mark.parametrize("beams", [2, 3, 5])
def test_few_beams_match_a_plain_beam_search(beams, length_penalty):
    decoding_rules, few = rules(max_tokens=6), BeamOptions(beams, length_penalty=length_penalty)
    found = beam_search(ToyDecoder(IMAGES), decoding_rules, len(IMAGES), beams, few)
    assert found == [best_of_groups(reference_search(image, decoding_rules, few)) for image in IMAGES]


@pytest.mark.parametrize(("beams", "groups"), [(4, 2), (6, 3), (3, 3)])
def test_groups_avoid_the_tokens_of_earlier_groups_and_results_are_ordered_by_rank(beams, groups):
    decoding_rules, diverse = rules(max_tokens=5), BeamOptions(beams, groups, diversity=1.5)
    wanted = [best_of_groups(reference_search(image, decoding_rules, diverse)) for image in IMAGES]
    found = beam_search(ToyDecoder(IMAGES), decoding_rules, len(IMAGES), beams, diverse)
    assert [texts[: len(of)] for texts, of in zip(found, wanted, strict=True)] == wanted
    alike = beam_search(ToyDecoder(IMAGES), decoding_rules, len(IMAGES), beams, BeamOptions(beams, groups))
    assert all(len(set(map(tuple, texts))) <= beams // groups for texts in alike)
    assert sum(map(len, wanted)) > len(IMAGES) * beams // groups


def test_texts_shared_by_groups_repeat_only_if_there_are_too_few():
    decoding_rules = rules(min_tokens=1, max_tokens=1)  # three texts in all
    [texts] = beam_search(ToyDecoder([11]), decoding_rules, 1, 5, BeamOptions(6, 2, diversity=0.01))
    assert sorted(text[0] for text in texts[:3]) == [0, 1, 2]
    assert texts[3:] == texts[:2]
    assert beam_search(ToyDecoder([11]), rules(min_tokens=0, max_tokens=0), 1, 3, BeamOptions(3)) == [[[], [], []]]


def test_finished_images_leave_the_batch_and_images_are_independent():
    decoding_rules, beams = rules(max_tokens=8), BeamOptions(3, length_penalty=0.0)
    forward = ToyDecoder(IMAGES)
    together = beam_search(forward, decoding_rules, len(IMAGES), 3, beams)
    assert forward.steps[0] == len(IMAGES)
    assert forward.steps[1] == 3 * len(IMAGES)
    assert any(later < now for now, later in itertools.pairwise(forward.steps[1:]))
    assert together == [beam_search(ToyDecoder([image]), decoding_rules, 1, 3, beams)[0] for image in IMAGES]


def test_an_image_with_non_finite_logits_gives_none_without_affecting_others():
    class Broken(ToyDecoder):
        def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
            logits = super().next_logits(tokens)
            broken = [image == 12 and len(words) == 3 for image, words in self._rows]
            return logits.masked_fill(torch.tensor(broken)[:, None], torch.nan)

    decoding_rules, beams = rules(min_tokens=3), BeamOptions(3)
    found = beam_search(Broken(IMAGES), decoding_rules, len(IMAGES), 2, beams)
    whole = beam_search(ToyDecoder(IMAGES), decoding_rules, len(IMAGES), 2, beams)
    assert found == [whole[0], None, whole[2], whole[3]]
