"""The steps of a decoder compiled, if that gives the logits and the tokens of before."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from teachers.coca.fixed_decoder import FixedCocaDecoder
from teachers.decoding.device_sampling import DeviceSampler
from teachers.decoding.schedule import Schedule
from teachers.fast_paths.recompilation import Compiler
from teachers.fast_paths.towers import check_equal, least_cosine
from teachers.runtime.determinism import unique_indices

_LOG = logging.getLogger(__name__)
#: What is compared: texts of images with so many tokens. Their numbers differ from each other and from those of rows.
_IMAGES, _CAPTIONS, _IMAGE_TOKENS = 8, 3, 40


def compile_steps(decoder: FixedCocaDecoder, sampler: DeviceSampler | None, precision: str, wanted: bool) -> None:
    """Compile the steps of a decoder and what ``sampler`` does with their logits.

    If that fails (it needs a C compiler, for example) or changes more than rounding, they stay as they are, with one
    line in the log. With ``wanted``, what goes wrong raises.
    """
    _LOG.warning("compiling the decoding steps of a captioner, once for all sizes")
    compiler = Compiler("the decoding steps", asked=wanted)
    before, tokens = probe(decoder, sampler)
    try:
        decoder.compile(compiler)
        if sampler is not None:
            sampler.compile(compiler)
        after, others = probe(decoder, sampler, before)
        check_equal(before, after, least_cosine(precision))
        if not torch.equal(tokens, others):
            raise ValueError("other tokens are chosen from equal logits")
        compiler.accept()
    except Exception as error:
        if wanted:
            raise
        compiler.give_up(error)


@torch.inference_mode()
def probe(
    decoder: FixedCocaDecoder, sampler: DeviceSampler | None, chosen_from: Sequence[torch.Tensor] = ()
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Logits [rows, vocabulary] of random tokens and images, with few and with many positions to attend to, and the
    tokens that ``sampler`` chooses: from these logits, or from those of an earlier call.

    Steps are launched as in decoding, since torch compiles a function again where its flags are others.
    """
    network, generator = decoder.network, torch.Generator().manual_seed(0)
    device = network.positions.device
    images = torch.randn(_IMAGES, _IMAGE_TOKENS, network.width, generator=generator).to(device)
    found = []
    try:
        with decoder.opened(images.unbind(), _CAPTIONS, _IMAGES), unique_indices():
            rows, places = decoder.room(_IMAGES, _CAPTIONS)
            entry = Schedule(_IMAGES, _CAPTIONS, rows, places).enter()
            assert entry is not None
            decoder.enter(entry)
            tokens = torch.randint(network.vocabulary_size, (rows, network.length), generator=generator).to(device)
            logits = torch.zeros(rows, network.vocabulary_size, dtype=network.dtype, device=device)
            position = torch.zeros(rows, dtype=torch.int64, device=device)

            def step() -> None:
                logits.copy_(decoder.step(tokens, position))

            for place in (0, network.length - 1):
                position.fill_(place)
                decoder.launch(step, place)
                found.append(logits[: len(entry.rows)].clone())
            return found, _choose(decoder, sampler, logits, chosen_from or found)
    finally:
        decoder.release()
        if sampler is not None:
            sampler.release()


def _choose(
    decoder: FixedCocaDecoder, sampler: DeviceSampler | None, logits: torch.Tensor, values: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The tokens that a sampler chooses from ``values``, one after the other. ``logits`` is their place in memory."""
    if sampler is None:
        return torch.zeros(0)
    state = sampler.reserve(len(logits))
    for zeros in (state.tokens, state.done, state.broken, state.position):
        zeros.zero_()
    state.drawn.copy_(torch.rand(state.drawn.shape, generator=torch.Generator().manual_seed(0)))

    def choose() -> None:
        sampler.advance(logits, *state.of_step())

    for number, chosen_from in enumerate(values):
        logits[: len(chosen_from)] = chosen_from
        decoder.launch(choose, number)
    return state.tokens
