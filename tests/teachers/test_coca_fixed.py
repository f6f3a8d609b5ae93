"""CoCa's decoding with fixed shapes, on a CPU and on a stand-in for a CUDA device."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from teachers.coca.captioner import CocaCaptioner
from teachers.coca.fixed_decoder import SIZES, FixedCocaDecoder
from teachers.coca.network import CocaNetwork
from teachers.device.accelerator import Accelerator
from teachers.registry import captioner_spec
from tests.helpers.real_sizes import RAISING
from tests.helpers.stand_in_cuda import StandIn, stand_in_cuda
from tests.teachers.test_coca_decoder import LENGTH, coca, difference

#: The demo's captioner, which is small and trained.
MODEL = f"local-dir:{Path(__file__).parents[2] / 'configs' / 'demo-models' / 'coca-64'}"
STRATEGIES: dict[str, dict[str, Any]] = {
    "nucleus": {"top_p": 0.9},
    "wide nuclei": {"top_p": 0.99, "temperature": 2.0, "max_length": 12},
    "all tokens": {"top_p": 1.0, "repetition_penalty": 1.3},
    "top_k": {"strategy": "top_k", "top_k": 20},
    "greedy": {"strategy": "greedy", "captions": 1},
    "diverse_beams": {"strategy": "diverse_beams", "beams": 4, "groups": 2},
}


def build(device: str, **options: Any) -> CocaCaptioner:
    spec = captioner_spec(**{"model": MODEL, "captions": 3, "max_length": 23, **options})
    return CocaCaptioner(spec, Accelerator(device))


def batch(captioner: CocaCaptioner, count: int) -> tuple[torch.Tensor, np.ndarray]:
    """Pixels on the device of a captioner, and seeds."""
    pixels = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pixels = torch.nn.functional.interpolate(pixels, (64, 64))
    seeds = np.arange(count * captioner.captions, dtype=np.uint64).reshape(count, captioner.captions)
    return captioner._accelerator.put(pixels), seeds


@pytest.mark.parametrize("text", [{}, {"pad_id": 7}], ids=str)
def test_logits_match_the_full_forward_pass_while_rows_are_repeated_dropped_and_reordered(text, monkeypatch):
    monkeypatch.setattr("teachers.coca.fixed_decoder.SIZES", (2, 4, 6, 9))
    monkeypatch.setattr("teachers.coca.fixed_decoder._MIN_VISIBLE", 2)
    whole, accelerator = coca(text), Accelerator("cpu")
    forward = FixedCocaDecoder(CocaNetwork(whole, accelerator, LENGTH), accelerator)
    assert difference(whole, forward=forward) < 1e-5


@pytest.mark.parametrize("options", STRATEGIES.values(), ids=STRATEGIES)
def test_captions_on_cuda_are_those_of_the_cpu_and_each_word_waits_once(options):
    on_cpu = build("cpu", **options)
    wanted = on_cpu.caption(*batch(on_cpu, 10))
    assert len({len(text) for of in wanted for text in of}) > 1
    with stand_in_cuda() as cuda:
        captioner = build("cuda", **options)
        pixels, seeds = batch(captioner, 10)
        assert captioner.caption(pixels[:3], seeds[:3]) == wanted[:3]
        assert captioner.caption(pixels, seeds) == wanted
        with cuda.counted() as counts:
            assert captioner.caption(pixels, seeds) == wanted
        # the texts are read once, and those of beams with their scores
        assert counts.synchronizations <= counts.graph_launches + 2, counts.describe()
        assert not any(copy.blocking for copy in counts.copies_to_device()), counts.describe()
        assert not RAISING & counts.by_name.keys()


def per_word(cuda: StandIn, **options: Any) -> dict[str, float]:
    """What each word of captions of equal length costs."""
    counted = []
    for length in (12, 15):
        captioner = build("cuda", max_length=length, min_length=length - 2, **options)
        pixels, seeds = batch(captioner, 2)
        captioner.generate(pixels, seeds)  # captures the graphs
        with cuda.counted() as counts:
            captioner.generate(pixels, seeds)
        counted.append(counts)
    few, many = ((c.operations, c.graph_launches, c.synchronizations, c.allocations, len(c.copies)) for c in counted)
    names = ("operations", "graphs", "waits", "allocations", "copies")
    return {name: (b - a) / 3 for name, a, b in zip(names, few, many, strict=True)}


def test_a_word_is_one_graph_and_one_wait_and_allocates_nothing():
    with stand_in_cuda() as cuda:
        graphs = per_word(cuda, top_p=0.3)  # no wide nuclei
        eager = per_word(cuda, top_p=0.3, compile=False)
        wide = per_word(cuda, top_p=0.99, temperature=3.0)
        beams = per_word(cuda, strategy="beams", beams=4)
    assert graphs == {"operations": 1, "graphs": 1, "waits": 1, "allocations": 0, "copies": 1}
    assert (eager["graphs"], eager["waits"], eager["copies"]) == (0, 1, 1)
    assert eager["operations"] <= 145
    assert (beams["graphs"], beams["waits"], beams["copies"]) == (1, 1, 1)
    assert beams["operations"] <= 80
    assert (wide["graphs"], wide["waits"], wide["copies"]) == (1, 1, 1)
    assert wide["operations"] <= 55


def test_graphs_are_captured_once_for_each_shape_and_replaced_only_when_the_batch_grows():
    with stand_in_cuda():
        captioner = build("cuda")
        steps = captioner._decoder.steps
        captioner.caption(*batch(captioner, 10))
        cache, captured = captioner._decoder.cache, dict(steps._graphs)
        assert 1 < len(captured) <= len(SIZES)
        for count in (10, 3, 10):
            captioner.caption(*batch(captioner, count))
        assert captioner._decoder.cache is cache
        assert all(steps._graphs[key] is graph for key, graph in captured.items())
        captioner.caption(*batch(captioner, 20))
        assert captioner._decoder.cache is not cache


def test_shapes_do_not_depend_on_earlier_batches():
    with stand_in_cuda() as cuda:
        fresh, used = build("cuda", compile=False), build("cuda", compile=False)
        used.caption(*batch(used, 20))
        shapes: dict[CocaCaptioner, list[Any]] = {fresh: [], used: []}
        for captioner, seen in shapes.items():
            step = captioner._decoder._network_step

            def record(*arguments: Any, step: Any = step, seen: list[Any] = seen) -> torch.Tensor:
                seen.append([(*a.shape, a.stride()) if isinstance(a, torch.Tensor) else a for a in arguments])
                return step(*arguments)

            captioner._decoder._network_step = record
            captioner.caption(*batch(captioner, 4))
        assert shapes[fresh] == shapes[used] != []
        assert cuda.compiled == []


def test_attention_never_uses_cudnn_while_captions_are_decoded(monkeypatch):
    enabled, attend = [], torch.nn.functional.scaled_dot_product_attention

    def record(*arguments: Any, **options: Any) -> torch.Tensor:
        enabled.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*arguments, **options)

    monkeypatch.setattr("teachers.coca.blocks.scaled_dot_product_attention", record)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        with stand_in_cuda():
            for compile_ in ("auto", False):
                captioner = build("cuda", compile=compile_)
                captioner.caption(*batch(captioner, 2))
        assert torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert enabled
    assert not any(enabled)


def test_a_compiled_captioner_gives_the_same_captions_for_batches_that_grow_and_shrink(monkeypatch):
    shapes, plain = [], torch.compile

    def backend(graph: Any, _: Any) -> Any:  # without code generation, which takes a minute for each shape
        shapes.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda step, **options: plain(step, backend=backend, **options))
    on_cpu, compiled = build("cpu"), build("cpu", compile=True)
    pixels, seeds = batch(on_cpu, 10)
    wanted = on_cpu.caption(pixels, seeds)
    with torch._dynamo.config.patch(recompile_limit=1):  # 8 by default
        for count in (1, 10, 1, 10):
            assert compiled.caption(pixels[:count], seeds[:count]) == wanted[:count]
        assert torch._dynamo.config.recompile_limit == 1
    assert len(shapes) == 2  # 16 and 32 rows


def test_broken_images_give_none_on_cuda_without_affecting_others():
    with stand_in_cuda():
        captioner = build("cuda")
        pixels, seeds = batch(captioner, 3)
        whole = captioner.caption(pixels, seeds)
        pixels[1] = torch.nan
        assert captioner.caption(pixels, seeds) == [whole[0], None, whole[2]]
        assert captioner.caption(*batch(captioner, 3)) == whole  # nothing of them stays in the caches


def test_a_captioner_that_ran_out_of_memory_returns_what_it_keeps_and_captions_a_smaller_batch():
    with stand_in_cuda() as cuda:
        captioner = build("cuda")
        pixels, seeds = batch(captioner, 10)
        whole = captioner.caption(pixels[:3], seeds[:3])
        with cuda.failing_allocations(lambda size: size > 400_000), pytest.raises(torch.OutOfMemoryError):
            captioner.caption(pixels, seeds)
        captioner.release_memory()
        assert captioner._decoder.capacity == 0
        assert captioner._sampler._state is None
        assert captioner.caption(pixels[:3], seeds[:3]) == whole


def test_compile_compiles_the_step_that_cuda_captures():
    with stand_in_cuda() as cuda:
        captioner = build("cuda", compile=True)
        pixels, seeds = batch(captioner, 3)
        captioner.caption(pixels, seeds)
        assert len(cuda.compiled) == 1
        with cuda.counted() as counts:
            captioner.caption(pixels, seeds)
        assert counts.graph_launches
