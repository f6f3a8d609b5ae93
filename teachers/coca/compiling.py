"""The steps of a decoder compiled, if that gives the logits and the tokens of before."""

from __future__ import annotations

import logging

import torch

from teachers.coca.fixed_decoder import FixedCocaDecoder
from teachers.decoding.device_sampling import DeviceSampler
from teachers.decoding.schedule import Schedule
from teachers.fast_paths.recompilation import many_shapes, settle_compiler
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
    _LOG.warning("compiling the decoding steps of a captioner, once for all sizes, which takes about a minute")
    before = probe_logits(decoder)
    tokens = _sampled(sampler, before)
    try:
        settle_compiler()
        decoder.compile()
        if sampler is not None:
            sampler.compile()
        check_equal(before, probe_logits(decoder), least_cosine(precision))
        if not torch.equal(tokens, _sampled(sampler, before)):
            raise ValueError("other tokens are chosen from equal logits")
    except Exception as error:
        if wanted:
            raise
        decoder.compile(False)
        if sampler is not None:
            sampler.compile(False)
        _LOG.warning("the captioner is not compiled: %s: %s", type(error).__name__, error)


@torch.inference_mode()
def probe_logits(decoder: FixedCocaDecoder) -> list[torch.Tensor]:
    """Logits [rows, vocabulary] of random tokens and images, with few and with many positions to attend to."""
    network, generator = decoder.network, torch.Generator().manual_seed(0)
    device = network.positions.device
    images = torch.randn(_IMAGES, _IMAGE_TOKENS, network.width, generator=generator).to(device)
    found = []
    with decoder.opened(images.unbind(), _CAPTIONS, _IMAGES), unique_indices():
        rows, places = decoder.room(_IMAGES, _CAPTIONS)
        entry = Schedule(_IMAGES, _CAPTIONS, rows, places).enter()
        assert entry is not None
        decoder.enter(entry)
        tokens = torch.randint(network.vocabulary_size, (rows, network.length), generator=generator).to(device)
        logits = torch.zeros(rows, network.vocabulary_size, device=device)
        position = torch.zeros(rows, dtype=torch.int64, device=device)

        def step() -> None:
            logits.copy_(decoder.step(tokens, position))

        for place in (0, network.length - 1):
            position.fill_(place)
            decoder.launch(step, place)
            found.append(logits[: len(entry.rows)].clone())
    decoder.release()
    return found


@torch.inference_mode()
def _sampled(sampler: DeviceSampler | None, logits: list[torch.Tensor]) -> torch.Tensor:
    """The tokens that a sampler chooses from logits, one after the other."""
    if sampler is None:
        return torch.zeros(0)
    state = sampler.reserve(len(logits[0]))
    for values in (state.tokens, state.done, state.broken, state.position):
        values.zero_()
    state.drawn.copy_(torch.rand(state.drawn.shape, generator=torch.Generator().manual_seed(0)))
    with many_shapes():
        for one in logits:
            sampler.advance(one, *state.of_step())
    sampler.release()
    return state.tokens
