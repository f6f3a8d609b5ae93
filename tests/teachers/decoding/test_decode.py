"""Decoding on a toy language, compared with enumeration and references, and which images enter a decoder when."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from teachers.decoding.decode import BeamOptions, beam_search, decode, sample
from teachers.decoding.sampling import DecodingRules, Schedule, TokenChooser, compact, entry_size
from teachers.spec import CaptionerSpec
from tests.helpers.models.tiny_captioners import seeds
from tests.helpers.specs import captioner_spec

# A toy language small enough to enumerate all texts. Logits depend on the image and on all tokens so far.
WORDS, START, END = (0, 1, 2), 3, 4
VOCABULARY = 5


class ToyDecoder:
    """A ``Decoder`` of the toy language. Raises AssertionError if rows and tokens do not match."""

    def __init__(self, images: Sequence[int]) -> None:
        self._rows = [(image, [START]) for image in images]
        self.steps: list[int] = []

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        assert len(tokens) == len(self._rows)
        for (_, before), now in zip(self._rows, tokens.tolist(), strict=True):
            assert now[: len(before)] == before
            assert len(now) == len(self.steps) + 1
        self._rows = [(image, now) for (image, _), now in zip(self._rows, tokens.tolist(), strict=True)]
        self.steps.append(len(tokens))
        return torch.stack([logits_of(image, now[1:]) for image, now in self._rows])

    def select_rows(self, rows: torch.Tensor) -> None:
        self._rows = [self._rows[row] for row in rows.tolist()]


def logits_of(image: int, words: Sequence[int]) -> torch.Tensor:
    seed = image
    for word in words:
        seed = seed * 7 + word + 1
    return 2 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))


def rules(min_tokens: int = 1, max_tokens: int = 4, repetition_penalty: float = 1.0) -> DecodingRules:
    impossible = torch.tensor([token == START for token in range(VOCABULARY)])
    return DecodingRules(START, END, impossible, min_tokens, max_tokens, repetition_penalty)


def log_probabilities(image: int, words: Sequence[int], rules: DecodingRules) -> list[float]:
    """Log-probabilities of the next token, by the definition of the rules."""
    logits = logits_of(image, words).tolist()
    for word in set(words):
        logits[word] *= 1 / rules.repetition_penalty if logits[word] > 0 else rules.repetition_penalty
    logits[START] = -torch.inf
    if len(words) < rules.min_tokens:
        logits[END] = -torch.inf
    result: list[float] = torch.tensor(logits, dtype=torch.float64).log_softmax(0).tolist()
    return result


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


@pytest.mark.parametrize(("strategy", "options"), STRATEGIES.items(), ids=STRATEGIES)
@pytest.mark.parametrize(
    "decoding_rules", [rules(), rules(min_tokens=3, repetition_penalty=1.5)], ids=["plain", "penalty"]
)
def test_captions_depend_on_their_image_and_seed_alone_for_any_strategy(strategy, options, decoding_rules):
    spec = make_spec(strategy, **options)
    row_seeds = seeds(len(IMAGES), spec.captions)
    together = decode(ToyDecoder(IMAGES), decoding_rules, spec, row_seeds)
    for i, image in enumerate(IMAGES):
        assert decode(ToyDecoder([image]), decoding_rules, spec, row_seeds[i : i + 1]) == [together[i]]
    for words in itertools.chain.from_iterable(together):
        assert decoding_rules.min_tokens <= len(words) <= decoding_rules.max_tokens
        assert set(words) <= set(WORDS)
    sampled = strategy in ("nucleus", "top_k")
    reversed_ = [texts[:: -1 if sampled else 1] for texts in together]
    assert decode(ToyDecoder(IMAGES), decoding_rules, spec, row_seeds[:, ::-1]) == reversed_
    assert (decode(ToyDecoder(IMAGES), decoding_rules, spec, row_seeds + np.uint64(1000)) != together) == sampled


def test_greedy_chooses_the_most_probable_token():
    decoding_rules = rules(min_tokens=2, max_tokens=6, repetition_penalty=1.4)
    found = decode(ToyDecoder(IMAGES), decoding_rules, make_spec("greedy", captions=1), seeds(len(IMAGES), 1))
    for image, [words] in zip(IMAGES, found, strict=True):
        path: list[int] = []
        while len(path) < 6 and (best := int(np.argmax(log_probabilities(image, path, decoding_rules)))) != END:
            path.append(best)
        assert words == path


def test_captions_share_a_row_until_the_first_token_and_ended_rows_leave_the_batch():
    forward = ToyDecoder(IMAGES)
    texts = sample(forward, rules(), TokenChooser(make_spec("greedy", captions=1)), torch.ones(len(IMAGES), 3, 4))
    lengths = [len(words) for of_image in texts for words in of_image]
    assert forward.steps == [len(IMAGES), *(sum(length >= step for length in lengths) for step in (1, 2, 3))]


@pytest.mark.parametrize(
    ("options", "value"), [({"temperature": 3.0, "top_p": 1.0}, torch.inf), ({"strategy": "beams"}, torch.nan)]
)
def test_an_image_with_non_finite_logits_gives_none_alone_and_all_of_several_are_an_error(options, value):
    class Broken(ToyDecoder):
        def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
            logits = super().next_logits(tokens)
            broken = [image == 22 and words[1:] == [1] for image, words in self._rows]
            return logits.masked_fill(torch.tensor(broken)[:, None], value)

    spec = make_spec(**options)
    row_seeds = seeds(len(IMAGES), 3)
    whole = decode(ToyDecoder(IMAGES), rules(3), spec, row_seeds)
    assert decode(Broken(IMAGES), rules(3), spec, row_seeds) == [*whole[:2], None, *whole[3:]]
    assert decode(Broken([22]), rules(3), spec, row_seeds[2:3]) == [None]
    with pytest.raises(ValueError, match="not finite: check the weights, or use `precision: bf16`"):
        decode(Broken([22, 22]), rules(3), spec, row_seeds[[2, 2]])


FEW_IMAGES = (11, 12, 13, 14)


def score(words: list[int], total: float, beams: BeamOptions) -> float:
    return total / (len(words) + 1) ** beams.length_penalty


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
    "decoding_rules", [rules(max_tokens=6), rules(min_tokens=3), rules(min_tokens=0, repetition_penalty=1.8)], ids=repr
)
@pytest.mark.parametrize("beams", [2, 3, 5, 81])
def test_beam_search_matches_a_plain_one_also_with_beams_for_all_texts(beams, decoding_rules, length_penalty):
    options = BeamOptions(beams, length_penalty=length_penalty)
    found = beam_search(ToyDecoder(FEW_IMAGES), decoding_rules, len(FEW_IMAGES), min(beams, 6), options)
    wanted = [best_of_groups(reference_search(image, decoding_rules, options)) for image in FEW_IMAGES]
    assert found == [texts[: min(beams, 6)] for texts in wanted]


@pytest.mark.parametrize(("beams", "groups"), [(4, 2), (6, 3), (3, 3)])
def test_groups_avoid_the_tokens_of_earlier_groups_and_results_are_ordered_by_rank(beams, groups):
    decoding_rules, diverse = rules(max_tokens=5), BeamOptions(beams, groups, diversity=1.5)
    wanted = [best_of_groups(reference_search(image, decoding_rules, diverse)) for image in FEW_IMAGES]
    found = beam_search(ToyDecoder(FEW_IMAGES), decoding_rules, len(FEW_IMAGES), beams, diverse)
    assert [texts[: len(of)] for texts, of in zip(found, wanted, strict=True)] == wanted
    alike = beam_search(ToyDecoder(FEW_IMAGES), decoding_rules, len(FEW_IMAGES), beams, BeamOptions(beams, groups))
    assert all(len(set(map(tuple, texts))) <= beams // groups for texts in alike)
    assert sum(map(len, wanted)) > len(FEW_IMAGES) * beams // groups


def test_texts_shared_by_groups_repeat_only_if_there_are_too_few():
    decoding_rules = rules(min_tokens=1, max_tokens=1)  # three texts in all
    [texts] = beam_search(ToyDecoder([11]), decoding_rules, 1, 5, BeamOptions(6, 2, diversity=0.01))
    assert sorted(text[0] for text in texts[:3]) == [0, 1, 2]
    assert texts[3:] == texts[:2]
    assert beam_search(ToyDecoder([11]), rules(min_tokens=0, max_tokens=0), 1, 3, BeamOptions(3)) == [[[], [], []]]


def test_finished_images_leave_the_batch_and_images_are_independent():
    decoding_rules, beams = rules(max_tokens=8), BeamOptions(3, length_penalty=0.0)
    forward = ToyDecoder(FEW_IMAGES)
    together = beam_search(forward, decoding_rules, len(FEW_IMAGES), 3, beams)
    assert forward.steps[0] == len(FEW_IMAGES)
    assert forward.steps[1] == 3 * len(FEW_IMAGES)
    assert any(later < now for now, later in itertools.pairwise(forward.steps[1:]))
    assert together == [beam_search(ToyDecoder([image]), decoding_rules, 1, 3, beams)[0] for image in FEW_IMAGES]


def test_compact_moves_rows_only_to_fill_gaps():
    for seed in range(200):
        going = np.random.default_rng(seed).random(seed % 13) < 0.6
        order = compact(going)
        assert sorted(order) == np.flatnonzero(going).tolist()
        stay = going[: len(order)]
        assert (order[stay] == np.flatnonzero(stay)).all()


NATURAL = 6 + np.random.default_rng(0).poisson(7, (650, 5)).clip(max=21)
SKEWED = 6 + np.random.default_rng(1).geometric(1 / 8, (650, 5)).clip(max=21)


def steps_of(lengths: np.ndarray, rows: int, places: int, ahead: int) -> list[int]:
    """The number of texts in each step of a decoder whose texts have these lengths, [images, captions].

    ``ahead`` steps are launched before the ends of texts in the one before are known.
    """
    images, captions = lengths.shape
    schedule, unknown = Schedule(images, captions, rows, places), deque[np.ndarray]()
    place_of, left, tokens = np.full(rows, places), np.zeros(rows, int), np.zeros(rows, int)
    active, entered = [], []
    while True:
        if (entry := schedule.enter()) is not None:
            assert (left[entry.rows] == 0).all(), "a text has lost its row"
            assert not {*entry.places} & {*place_of[left > 0]}, "two images share a place"
            place_of = entry.place_of
            left[entry.rows], tokens[entry.rows] = lengths.reshape(-1)[entry.captions], 0
            entered += entry.captions.tolist()
            np.testing.assert_array_equal(place_of[entry.rows], entry.places.repeat(captions))
            assert not active or not schedule.waiting or len(entry.images) % entry_size(places) == 0
        active.append(int((left > 0).sum()))
        assert schedule.longest >= tokens[left > 0].max(initial=0), "attention would not see all of the longest text"
        left, tokens = (left - 1).clip(min=0), tokens + 1
        schedule.launch()
        unknown.append(left == 0)
        if len(unknown) > ahead and schedule.advance(unknown.popleft()).all() and not schedule.waiting:
            break
    assert entered == [*range(images * captions)], "images enter in their order, each once"
    assert sum(active) == lengths.sum()
    assert sum(active[-1 - ahead :]) > 0, "steps without texts at the end"
    return active


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("captions", [1, 2, 5])
@pytest.mark.parametrize("images", [1, 3, 40])
def test_each_image_enters_once_in_order_in_free_rows_and_a_place(images: int, captions: int, ahead: int) -> None:
    lengths = np.random.default_rng(images).integers(1, 9, (images, captions))
    lengths[0] = 1  # ends at the first step
    steps_of(lengths, 16, 16 // captions, ahead)
    steps_of(lengths, 80, 32, ahead)
    assert Schedule(0, captions, 16, 16 // captions).enter() is None, "no images take no steps"


@pytest.mark.parametrize("lengths", [NATURAL, SKEWED], ids=["natural", "skewed"])
def test_rows_stay_full_until_the_last_images_so_that_the_tail_costs_under_a_fifth(lengths: np.ndarray) -> None:
    active = np.array(steps_of(lengths, 640, 160, ahead=0))
    alone = sum(int(part.max()) for part in np.split(lengths, range(128, 650, 128)))  # steps of batches of 128 images
    assert len(active) < 0.65 * alone
    tail = active < 640 / 2
    cost = 400 + np.maximum(active, 16)  # a step of few rows costs less than half of one of 640
    assert cost[tail].sum() < 0.2 * cost.sum()
    assert active[~tail].mean() > 0.85 * 640 if lengths is NATURAL else 0.75 * 640
    assert len(steps_of(lengths, 640, 160, ahead=1)) <= 1.08 * len(active)
