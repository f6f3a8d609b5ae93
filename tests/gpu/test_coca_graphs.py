"""CoCa's CUDA graphs on a stand-in: when they are captured, what they keep, and which keys turn them off."""

from __future__ import annotations

import itertools
from typing import Any

import open_clip
import pytest
import torch

from teachers.coca.captioner import CocaCaptioner
from teachers.coca.fixed_decoder import SIZES
from teachers.fast_paths import usage
from teachers.fast_paths.frozen import freeze
from tests.helpers.models.tiny_coca import batch, build, coca_config
from tests.helpers.specs import captioner_spec
from tests.helpers.stand_in_cuda import stand_in_cuda

VOCABULARY, START, END, LENGTH = 60, 58, 59, 8


def coca(text: dict[str, Any], **model: Any) -> Any:
    """A tiny CoCa with random parameters."""
    config = coca_config(vocab_size=VOCABULARY, **text)["model_cfg"]
    config["multimodal_cfg"].update(model.pop("multimodal", {}))
    config["vision_cfg"].update(model.pop("vision", {}))
    del config["custom_text"]
    correct = model.pop("correct_cls_mask", False)
    coca_model = open_clip.CoCa(**config, **model)
    coca_model.text.correct_cls_mask = correct
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in coca_model.named_parameters():
            if parameter.ndim:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2.0 if "gamma" in name else 0.5))
    return coca_model.eval().requires_grad_(False)


@pytest.mark.usefixtures("own_fast_paths")
def test_each_fast_path_of_a_captioner_has_a_key_and_one_switch_turns_all_off(monkeypatch):
    """Without ``compile`` there are no graphs either, unless ``graphs`` is true."""
    frozen: list[Any] = []
    monkeypatch.setattr("teachers.coca.captioner.freeze", lambda *options: frozen.append(options) or freeze(*options))
    paths = {
        (): {"fused_attention", "compile", "graphs"},
        ("compile",): {"fused_attention"},
        ("graphs",): {"fused_attention", "compile"},
        ("fused_attention",): {"compile", "graphs"},
    }
    for off, expected in paths.items():
        for plain in (False, True):
            spec = captioner_spec(model="coca_ViT-B-32", pretrained="x", **dict.fromkeys(off, False))
            usage.set_enabled(not plain)
            spec = usage.in_force(spec)
            frozen.clear()
            with stand_in_cuda() as cuda:
                captioner = build("cuda", **{key: getattr(spec, key) for key in spec.fast_paths})
                found = {
                    "fused_attention": bool(frozen),
                    "compile": bool(cuda.compiled),
                    "graphs": captioner._decoder.steps._stream is not None,
                }
            assert {path for path, used in found.items() if used} == (set() if plain else expected), off
    assert captioner_spec(model="a", pretrained="x", compile=False, graphs=True).uses_graphs


def test_graphs_are_captured_once_for_each_shape_and_replaced_only_when_the_batch_grows():
    with stand_in_cuda():
        captioner = build("cuda")
        steps = captioner._decoder.steps
        captioner.caption(*batch(captioner, 10))
        cache, captured = captioner._decoder.cache, dict(steps.graphs)
        assert 1 < len(captured) <= len(SIZES)
        for count in (10, 3, 10):
            captioner.caption(*batch(captioner, count))
        assert captioner._decoder.cache is cache
        assert all(steps.graphs[key] is graph for key, graph in captured.items())
        captioner.caption(*batch(captioner, 20))
        assert captioner._decoder.cache is not cache


def test_shapes_do_not_depend_on_earlier_batches():
    with stand_in_cuda() as cuda:
        fresh, used = build("cuda", compile=False), build("cuda", compile=False)
        used.caption(*batch(used, 20))
        shapes: dict[CocaCaptioner, list[Any]] = {fresh: [], used: []}
        for captioner, seen in shapes.items():
            step = captioner._decoder.network.step

            def record(*arguments: Any, step: Any = step, seen: list[Any] = seen) -> torch.Tensor:
                seen.append([(*a.shape, a.stride()) if isinstance(a, torch.Tensor) else a for a in arguments])
                return step(*arguments)

            captioner._decoder.network.step = record
            captioner.caption(*batch(captioner, 4))
        assert shapes[fresh] == shapes[used] != []
        assert cuda.compiled == []


def test_broken_images_give_none_without_affecting_others():
    with stand_in_cuda():
        for captioner in (build("cpu"), build("cuda")):
            pixels, seeds = batch(captioner, 3)
            whole = captioner.caption(pixels, seeds)
            pixels[1] = torch.nan
            assert captioner.caption(pixels, seeds) == [whole[0], None, whole[2]]
        more, seeds = batch(captioner, 12)  # in 16 rows, so that others take the place of the broken one
        images, more[1] = captioner.encode(more).unbind(), torch.nan
        broken = captioner.encode(more).unbind()
        others = captioner.decode(images, seeds, at_once=1)
        assert captioner.decode(broken, seeds, at_once=1) == [others[0], None, *others[2:]]
        assert captioner.caption(*batch(captioner, 3)) == whole  # nothing of them stays in the caches


def test_a_captioner_that_ran_out_of_memory_returns_what_it_keeps_and_captions_a_smaller_batch():
    with stand_in_cuda() as cuda:
        captioner = build("cuda")
        fresh = cuda.allocated
        pixels, seeds = batch(captioner, 10)
        whole = captioner.caption(pixels[:3], seeds[:3])
        for number in range(0, 12, 2):  # of the caches' allocation that fails
            large = itertools.count()
            fails = lambda size, number=number, large=large: size > 20_000 and next(large) == number  # noqa: E731
            with cuda.failing_allocations(fails), pytest.raises(torch.OutOfMemoryError):
                captioner.caption(pixels, seeds)
            assert captioner.caption(pixels[:3], seeds[:3]) == whole
            kept = cuda.allocated
            captioner.release_memory()
            assert captioner._decoder.capacity == 0
            assert captioner._sampler._state is None
            assert cuda.allocated - fresh < 0.1 * (kept - fresh)
