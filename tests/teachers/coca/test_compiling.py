"""Compiled steps of CoCa's decoding: when they are used, and for which shapes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests.helpers.models.tiny_coca import batch, build
from tests.helpers.stand_in_cuda import stand_in_cuda


def test_a_compiled_captioner_has_the_same_captions_and_graphs_for_batches_that_grow_and_shrink(monkeypatch):
    graphs, plain = [], torch.compile

    def backend(graph: Any, _: Any) -> Any:  # without code generation
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda step, **options: plain(step, **{**options, "backend": backend}))
    on_cpu = build("cpu")
    with torch._dynamo.config.patch(recompile_limit=1):  # 8 by default
        compiled = build("cpu", compile=True)
        loaded = len(graphs)
        pixels, seeds = batch(on_cpu, 10)
        wanted = on_cpu.caption(pixels, seeds)
        for count in (1, 10, 1, 10):
            assert compiled.caption(pixels[:count], seeds[:count]) == wanted[:count]
        assert torch._dynamo.config.recompile_limit == 1
    assert len(graphs) == loaded <= 8, "of two kinds of blocks, the masks, the newest tokens, the logits, the choice"


@pytest.mark.parametrize("compile_", ["auto", True])
def test_steps_are_compiled_by_parts_and_then_captured(compile_, caplog):
    with stand_in_cuda() as cuda:
        captioner = build("cuda", compile=compile_)
        pixels, seeds = batch(captioner, 3)
        captioner.caption(pixels, seeds)
        network = captioner._decoder.network
        blocks = [*network.text_blocks, *network.decoder_blocks, *network.cross_blocks]
        assert len(cuda.compiled) == len(blocks) + len(("newest", "masks", "logits", "choice"))
        assert all(one["dynamic"] and one["fullgraph"] for one in cuda.compiled)
        with cuda.counted() as counts:
            captioner.caption(pixels, seeds)
        assert counts.graph_launches
    assert caplog.text.count("compiling the decoding steps of a captioner") == 1


def fail(*_: Any) -> None:
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")


def choose_otherwise(logits: torch.Tensor, *state: torch.Tensor) -> None:
    state[0].add_(1)


@pytest.mark.parametrize(
    ("function", "compiled", "message"),
    [
        ("_call_impl", fail, "RuntimeError: Failed to find C compiler"),
        ("_logits", lambda x, _: x.new_zeros(1), "ValueError: results change (cosine 0.0"),
        ("_advance", choose_otherwise, "ValueError: other tokens are chosen from equal logits"),
    ],
)
def test_what_cannot_be_compiled_or_has_other_results_is_not_unless_the_config_asks_for_it(
    function, compiled, message, caplog
):
    with stand_in_cuda(), pytest.MonkeyPatch.context() as patch:
        plain = build("cuda", compile=False)
        pixels, seeds = batch(plain, 3)
        wanted = plain.caption(pixels, seeds)
        keep = lambda of, **_: compiled if of.__name__ == function else of  # noqa: E731
        patch.setattr(torch, "compile", keep)  # undone before the stand-in puts torch's own function back
        captioner = build("cuda")
        assert captioner.caption(pixels, seeds) == wanted
        assert f"the captioner is not compiled: {message}" in caplog.text
        assert captioner._decoder.steps._graphs
        with pytest.raises((RuntimeError, ValueError), match=re.escape(message.split(": ")[1])):
            build("cuda", compile=True)
