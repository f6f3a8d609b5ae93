"""Which steps of CoCa are compiled on a stand-in for a card, and what happens where that fails."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from teachers.fast_paths import recompilation
from teachers.fast_paths.usage import loading, set_enabled, snapshot
from tests.helpers.models.tiny_coca import batch, build
from tests.helpers.stand_in_cuda import stand_in_cuda


@pytest.mark.parametrize("compile_", ["auto", True])
def test_steps_are_compiled_by_parts_and_then_captured(compile_, caplog):
    set_enabled(True)
    with stand_in_cuda() as cuda, loading("coca"):
        captioner = build("cuda", compile=compile_)
        pixels, seeds = batch(captioner, 3)
        captioner.caption(pixels, seeds)
        network = captioner._decoder.network
        blocks = [*network.text_blocks, *network.decoder_blocks, *network.cross_blocks]
        steps = [one for one in cuda.compiled if one["dynamic"] and one["fullgraph"]]
        assert len(steps) == len(blocks) + len(("newest", "masks", "logits", "choice"))
        assert len(cuda.compiled) - len(steps) == 3, "blocks of the image tower"
        with cuda.counted() as counts:
            captioner.caption(pixels, seeds)
        assert counts.graph_launches
        with cuda.counted() as counts:
            assert len(captioner.encode(pixels)) == 3
        assert counts.by_name["addmm"] == 3 * 4 + 2, "queries, keys and values of a block are one product"
    [used] = [one for one in snapshot() if one.path == "compile"]
    assert (used.model, used.asked, used.plain, used.reason) == ("coca", compile_ is True, 0, None)
    assert used.used > len(cuda.compiled)
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
def test_what_cannot_be_compiled_or_has_other_results_is_not_unless_asked_for(function, compiled, message, caplog):
    with stand_in_cuda(), pytest.MonkeyPatch.context() as patch:
        plain = build("cuda", compile=False)
        pixels, seeds = batch(plain, 3)
        wanted = plain.caption(pixels, seeds)

        def inductor(*_: Any) -> Any:
            return lambda call: compiled(*call.args) if call.func.__name__ == function else call()

        patch.setattr(recompilation, "inductor", inductor)  # undone before the stand-in puts its own function back
        captioner = build("cuda")
        assert captioner.caption(pixels, seeds) == wanted
        assert f"without the fast path `compile`: the decoding steps: {message}" in caplog.text
        assert captioner._decoder.steps.graphs
        with pytest.raises((RuntimeError, ValueError), match=re.escape(message.split(": ")[1])):
            build("cuda", compile=True)
