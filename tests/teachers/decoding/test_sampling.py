"""Nucleus and top-k sampling compared with their definitions, and what the host waits for on a stand-in for CUDA."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teachers.decoding.device_sampling import DeviceSampler
from teachers.decoding.sampling import DecodingRules, TokenChooser, sample_nucleus, sample_top_k, uniforms
from tests.helpers.models.tiny_coca import batch, build
from tests.helpers.specs import captioner_spec
from tests.helpers.stand_in_cuda import stand_in_cuda

TEN_THOUSAND = torch.from_numpy((np.arange(10_000) + 0.5) / 10_000)
GOLDEN = [0.8720734548204874, 0.29536538151378366, 0.42009767850724233]


def by_sorting(logits: torch.Tensor, u: torch.Tensor, temperature: float, top_p: float) -> list[int]:
    """Expected tokens of sample_nucleus, computed from sorted rows."""
    tokens = []
    for row, at in zip(torch.softmax(logits / temperature, -1).double().numpy(), u.tolist(), strict=True):
        falling = np.sort(row)[::-1]
        inside = np.cumsum(falling) - falling < top_p if top_p < 1 else falling > 0
        weights = np.where(row >= falling[np.flatnonzero(inside)[-1]], row, 0)
        tokens.append(int(np.searchsorted(np.cumsum(weights), at * np.cumsum(weights)[-1])))
    return tokens


@settings(max_examples=60)
@given(
    st.integers(1, 400) | st.integers(300, 9_000),
    st.sampled_from([0.0, 1e-3, 0.1, 1.0, 3.0, 8.0]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.floats(0.01, 1, exclude_max=True) | st.just(1.0),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.integers(0, 2**32),
)
def test_a_token_is_possible_and_that_of_its_row_alone_by_sorting(size, spread, dtype, top_p, temperature, seed):
    """Rounded to bfloat16, hundreds of logits tie; without spread, all of them do."""
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(4, size, generator=generator)).to(dtype).float()
    logits[:, : min(50, size // 2)] = -torch.inf
    logits[1] *= 0.01
    u = torch.rand(4, dtype=torch.float64, generator=generator).clamp(min=2**-53)
    u[0], u[-1] = 2.0**-53, 1.0
    assert sample_nucleus(logits, u, temperature, top_p).tolist() == by_sorting(logits, u, temperature, top_p)


@pytest.mark.parametrize("top_k", [1, 3, 50])
def test_top_k_includes_tokens_as_probable_as_the_last(top_k):
    logits = torch.tensor([0.3, 2.0, -1.0, 1.1, 1.1, -math.inf, 1.9, -0.2])
    expected = {token: math.exp(logits[token] / 2) for token in sorted(range(8), key=lambda i: -logits[i])[:top_k]}
    if top_k == 3:
        expected[4] = expected[3]
    exact = torch.bincount(sample_top_k(logits.repeat(10_000, 1), TEN_THOUSAND, 2.0, top_k), minlength=8)
    wanted = torch.tensor([expected.get(i, 0.0) / sum(expected.values()) for i in range(8)])
    assert torch.allclose(exact / 10_000, wanted, atol=2e-4)


def test_non_finite_rows_do_not_affect_others():
    logits = torch.randn(3, 5_000, generator=torch.Generator().manual_seed(1))
    u = TEN_THOUSAND[[500, 5000, 9000]]
    for top_p in (0.5, 1.0):
        alone = sample_nucleus(logits, u, 1.0, top_p)
        for value in (math.nan, math.inf):
            broken = logits.clone()
            broken[1, 7] = value
            found = sample_nucleus(broken, u, 1.0, top_p)
            assert found[[0, 2]].tolist() == alone[[0, 2]].tolist()
            assert 0 <= found[1] < 5_000


@pytest.mark.parametrize(("size", "spread", "top_p"), [(9_000, 0.1, 0.9), (3_000, 0.0, 0.5), (9_000, 8.0, 0.99)])
def test_nuclei_without_waiting_are_the_same(size, spread, top_p):
    """Both halves together, on a CPU and with the sums of CUDA."""
    generator = torch.Generator().manual_seed(3)
    logits = spread * torch.randn(200, size, generator=generator)
    logits[1] *= 100
    u = torch.rand(200, dtype=torch.float64, generator=generator).clamp(min=2**-53)
    expected = sample_nucleus(logits, u, 1.0, top_p)
    chooser = TokenChooser(captioner_spec(model="any", top_p=top_p))

    def sample(logits: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        probabilities = torch.empty_like(logits)
        tokens, wide = chooser.without_waiting(logits, u, probabilities)
        return torch.where(wide, chooser.remaining(probabilities, u), tokens)

    assert torch.equal(sample(logits, u), expected)
    with stand_in_cuda() as cuda:
        on_device = logits.to("cuda"), u.to("cuda")
        with cuda.counted() as counts:
            found = sample(*on_device)
        assert torch.equal(found.cpu(), expected)
        assert counts.synchronizations == 0, counts
        assert counts.by_name["cumsum"] == 0  # torch has no deterministic one on CUDA


def test_uniforms_depend_only_on_their_seed_and_match_golden_values():
    seeds = np.array([0, 7, 2**64 - 1], np.uint64)
    drawn = uniforms(seeds, 3)
    assert np.array_equal(uniforms(seeds[::-1], 3), drawn[::-1])
    assert np.array_equal(uniforms(seeds[1:2], 5)[0, :3], drawn[1])
    assert drawn[1].tolist() == GOLDEN
    many = uniforms(np.arange(200, dtype=np.uint64), 50)
    assert many.min() > 0
    assert many.max() <= 1
    assert abs(many.mean() - 0.5) < 4 / math.sqrt(12 * 10_000)
    assert abs(np.corrcoef(many[:-1].ravel(), many[1:].ravel())[0, 1]) < 0.04


START, END = 3, 4


def test_rows_whose_token_is_open_repeat_a_step_and_have_the_captions_of_the_cpu():
    options = {"top_p": 0.9, "repetition_penalty": 1.3, "max_length": 22}
    on_cpu = build("cpu", **options)
    pixels, seeds = batch(on_cpu, 60)
    wanted = on_cpu.generate(pixels, seeds)
    with stand_in_cuda() as cuda:
        captioner = build("cuda", **options)
        images, drawn = captioner.encode(captioner._accelerator.put(pixels)).unbind(), captioner.draw(seeds)
        assert captioner.decode(images, drawn, at_once=20) == wanted
        with cuda.counted() as counts, cuda.delayed():
            assert captioner.decode(images, drawn, at_once=20) == wanted
        steps = captioner._decoder.steps.graphs
        assert {kind for kind, _ in steps} == {"enter", "begin", "step", "decide"}
        # The host waits at once only where many tokens are open.
        assert counts.idle.total() < 0.2 * counts.synchronizations, counts


def test_images_enter_by_graphs_and_the_first_words_attend_to_16_positions():
    with stand_in_cuda() as cuda:
        captioner = build("cuda", max_length=24, min_length=8, top_p=0.3)
        decoder, (pixels, seeds), entries = captioner._decoder, batch(captioner, 40), []
        images, drawn = captioner.encode(pixels).unbind(), captioner.draw(seeds)
        captioner.decode(images, drawn, at_once=10)
        enter = decoder.enter
        decoder.enter = lambda entry: (entries.append(len(entry.images)), enter(entry))
        operations = []
        for count in (10, 40):
            entries.clear()
            with cuda.counted() as counts:
                captioner.decode(images[:count], drawn[:count], at_once=10)
            operations.append(counts.operations - counts.graph_launches)
        assert len(entries) > 3
        assert operations[1] - operations[0] <= 3 * (len(entries) - 1), "texts are stored, and images stacked"
        assert {shape[3] for kind, shape in decoder.steps.graphs if kind == "step"} == {16, 22}


def test_a_token_is_chosen_later_only_in_rows_that_the_last_step_has_left_open():
    spec = captioner_spec(model="any", captions=1, top_p=0.9)
    sampler = DeviceSampler(DecodingRules(START, END, torch.arange(5) == START, 0, 4), TokenChooser(spec))
    state = sampler.reserve(3)
    state.start(3, START, sampler._padding)
    count = state.put(np.arange(3), np.arange(3), np.full((3, 4), 0.5))
    state.begin(count, sampler._padding)
    state.tokens[:, 1], state.position[:] = 0, 1
    state.probabilities[:] = torch.tensor([[0, 0.5, 0, 0, 0], [0, 0.5, 0, 0, 0], [0, 0, 0, 0, 0.5]])
    state.flags[:] = torch.tensor([2, 0, 2])
    sampler._decide(state, state.put(np.arange(3)))
    assert state.tokens[:, :3].tolist() == [[START, 0, 1], [START, 0, START], [START, 0, END]]
    assert state.position.tolist() == [2, 1, 4]
    assert state.done.tolist() == [False, False, True]
