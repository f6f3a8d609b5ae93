"""Sampling on a stand-in for CUDA: what the host waits for, and tokens that are chosen one step late."""

from __future__ import annotations

import numpy as np
import torch

from teachers.decoding.device_sampling import DeviceSampler
from teachers.decoding.rules import DecodingRules
from teachers.decoding.sampling import TokenChooser
from teachers.registry import captioner_spec
from tests.helpers.models.tiny_coca import batch, build
from tests.helpers.stand_in_cuda import stand_in_cuda

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
        steps = captioner._decoder.steps._graphs
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
        assert {shape[3] for kind, shape in decoder.steps._graphs if kind == "step"} == {16, 22}


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
