"""CoCa's decoders compared with open_clip's full forward pass, on a CPU and on a stand-in for a CUDA device."""

from __future__ import annotations

from functools import partial
from typing import Any

import open_clip
import pytest
import torch

from teachers.coca.decoder import CocaDecoder, CocaNetwork, PlainCocaDecoder, check_decodable
from teachers.coca.fixed_decoder import FixedCocaDecoder
from teachers.runtime.accelerator import Accelerator, cache_bytes
from tests.helpers.models.tiny_coca import batch, build, coca_config
from tests.helpers.real_sizes import RAISING
from tests.helpers.stand_in_cuda import StandIn, stand_in_cuda

VOCABULARY, START, END, LENGTH = 60, 58, 59, 8
#: Kinds of models: keys of ``text_cfg``, and others.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "layer scale": ({"ls_init_value": 0.3}, {}),
    "query and key norms": ({"qk_norm": True}, {}),
    "scaled heads": ({"scale_heads": True}, {}),
    "norms inside": ({"scale_attn_inner": True, "scale_attn": True, "scale_fc": True}, {}),
    "custom block without any of them": ({"block_type": "custom"}, {}),
    "tanh": ({"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}}, {}),
    "another padding": ({"pad_id": 7}, {}),
    "more layers, wider words": ({"layers": 3, "mlp_ratio": 2.0}, {}),
    "a linear projection with bias": ({"proj_bias": True}, {}),
    "quick gelu": ({}, {"quick_gelu": True}),
    "a deeper decoder": ({}, {"multimodal": {"ls_init_value": 0.3, "layers": 3}}),
    "other heads": ({}, {"multimodal": {"heads": 4}}),
    "no pooling of images": ({}, {"vision": {"attentional_pool": False}}),
    "cast to bf16": ({}, {"cast_dtype": torch.bfloat16}),
    "a mask that hides the padding itself": ({}, {"correct_cls_mask": True}),
}


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


def image_tokens(model: Any, count: int) -> torch.Tensor:
    pixels = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        tokens: torch.Tensor = model._encode_image(pixels)[1]
    return tokens


def logits_of_steps(forward: Any, images: int) -> list[torch.Tensor]:
    """Logits along fixed tokens while rows are repeated, dropped and reordered. Token 0 is an ordinary token."""
    words = torch.randint(0, VOCABULARY - 2, (LENGTH, 20), generator=torch.Generator().manual_seed(2))
    words[2, ::2] = words[4, 1::3] = 0  # the model's padding token
    words[3, ::2] = 7
    taken = {0: torch.arange(images).repeat_interleave(3), 3: [0, 5, 2, 3], 4: [1, 1, 0, 3, 2], 6: [4, 2]}
    tokens = torch.full((images, 1), START)
    logits = []
    for step in range(LENGTH):
        logits.append(forward.next_logits(tokens).clone())  # a decoder may use their memory again
        rows = torch.as_tensor(taken.get(step, torch.arange(len(tokens))))
        forward.select_rows(rows)
        tokens = torch.cat([tokens[rows], words[step, : len(rows), None]], dim=1)
    return logits


def build_decoder(model: Any, precision: str = "fp32", length: int = LENGTH) -> CocaDecoder:
    accelerator = Accelerator("cpu", precision)
    return CocaDecoder(CocaNetwork(model, accelerator, length), accelerator)


def difference(model: Any, precision: str = "fp32", forward: Any = None) -> float:
    forward = forward or build_decoder(model, precision)
    images = image_tokens(model, 3)
    for tokens in (images * torch.nan, images):  # the second reuses the caches of the first
        forward.begin(tokens, 3)
        found = logits_of_steps(forward, 3)
    plain = PlainCocaDecoder(model, Accelerator("cpu", precision))  # open_clip's own forward pass
    plain.begin(images, 1)
    wanted = logits_of_steps(plain, 3)
    assert [len(rows) for rows in found] == [3, 9, 9, 9, 4, 5, 5, 2]
    return max((a - b).abs().max().item() / b.abs().max().item() for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_logits_match_the_full_forward_pass_for_every_kind_of_model(options):
    text, others = options
    assert difference(coca(text, **others)) < 1e-5


def test_a_tower_without_class_token_matches_the_logits_of_a_text_of_full_length():
    model = coca({"embed_cls": False})
    forward, images = build_decoder(model), image_tokens(model, 2)
    forward.begin(images, 1)
    tokens = torch.full((2, 76), START)  # open_clip's forward pass accepts no shorter text
    tokens[:, 1:] = torch.randint(0, VOCABULARY, (2, 75), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        wanted = model(None, tokens, image_latent=images[:, 0], image_embs=images, output_labels=False)["logits"]
        for length in range(1, LENGTH + 1):
            found = forward.next_logits(tokens[:, :length])
            torch.testing.assert_close(found, wanted[:, length - 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("precision", "apart"), [("bf16", 0.03), ("fp16", 0.005)])
def test_lower_precisions_match_autocast_within_rounding(precision, apart):
    model = coca({})
    assert difference(model, precision) < apart
    full, low = build_decoder(model), build_decoder(model, precision)
    assert low.bytes_per_image(5, 10) * 2 == full.bytes_per_image(5, 10)


def test_unsupported_towers_are_rejected():
    with pytest.raises(ValueError, match="scaled_cosine_attn"):
        check_decodable(coca({"scaled_cosine_attn": True}))
    with pytest.raises(ValueError, match="not causal"):
        check_decodable(coca({"no_causal_mask": True}))
    odd = coca({})
    odd.text_decoder.resblocks[0].attn = torch.nn.Identity()
    with pytest.raises(ValueError, match="blocks of type ResidualAttentionBlock"):
        check_decodable(odd)
    odd.text_decoder.resblocks[0] = torch.nn.Identity()
    with pytest.raises(ValueError, match="blocks of type Identity are unknown"):
        check_decodable(odd)


STRATEGIES: dict[str, dict[str, Any]] = {
    "nucleus": {"top_p": 0.9},
    "wide nuclei": {"top_p": 0.99, "temperature": 2.0, "max_length": 12},
    "all tokens": {"top_p": 1.0, "repetition_penalty": 1.3},
    "top_k": {"strategy": "top_k", "top_k": 20},
    "greedy": {"strategy": "greedy", "captions": 1},
    "diverse_beams": {"strategy": "diverse_beams", "beams": 4, "groups": 2},
}


@pytest.mark.parametrize("text", [{}, {"pad_id": 7}], ids=str)
def test_logits_match_the_full_forward_pass_while_rows_are_repeated_dropped_and_reordered(text, monkeypatch):
    monkeypatch.setattr("teachers.coca.fixed_decoder.SIZES", (2, 4, 6, 9))
    monkeypatch.setattr("teachers.coca.fixed_decoder._MIN_VISIBLE", 2)
    whole, accelerator = coca(text), Accelerator("cpu")
    forward = FixedCocaDecoder(CocaNetwork(whole, accelerator, LENGTH), accelerator)
    assert difference(whole, forward=forward) < 1e-5


@pytest.mark.parametrize("options", STRATEGIES.values(), ids=STRATEGIES)
def test_captions_on_cuda_are_those_of_the_cpu_and_a_word_waits_at_most_once(options, monkeypatch, request):
    attend, enabled = torch.nn.functional.scaled_dot_product_attention, []

    def record(*arguments: Any, **others: Any) -> torch.Tensor:
        enabled.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*arguments, **others)

    request.addfinalizer(partial(torch.backends.cuda.enable_cudnn_sdp, torch.backends.cuda.cudnn_sdp_enabled()))
    torch.backends.cuda.enable_cudnn_sdp(True)
    on_cpu = build("cpu", **options)
    wanted = on_cpu.caption(*batch(on_cpu, 10))
    assert len({len(text) for of in wanted for text in of}) > 1
    monkeypatch.setattr("teachers.coca.decoder.scaled_dot_product_attention", record)
    with stand_in_cuda() as cuda:
        captioner = build("cuda", **options)
        pixels, seeds = batch(captioner, 10)
        assert captioner.caption(pixels[:3], seeds[:3]) == wanted[:3]
        assert captioner.caption(pixels, seeds) == wanted
        with cuda.counted() as counts:
            assert captioner.caption(pixels, seeds) == wanted
        # the texts are read once, and those of beams with their scores
        assert counts.synchronizations <= counts.graph_launches + 2, counts
        if captioner.by_group and "0.99" not in str(options):  # its nuclei are wide, and wait for their token
            assert counts.idle.total() == 1, "while texts are decoded, the device has the next step to do"
        assert not any(copy.blocking for copy in counts.copies_to_device()), counts
        assert not RAISING & counts.by_name.keys()
        assert captioner.by_group == ("beams" not in str(options.get("strategy")))
        if captioner.by_group:  # in 16 rows, so that images replace others
            images, drawn = captioner.encode(pixels).unbind(), captioner.draw(seeds)
            assert captioner.to_texts(captioner.decode(images, drawn, at_once=1)) == wanted
            assert captioner.decode([], drawn[:0]) == []
        assert torch.backends.cuda.cudnn_sdp_enabled()
    assert {*enabled} == {False}, "its kernels are not deterministic"


def per_word(cuda: StandIn, **options: Any) -> dict[str, float]:
    """What each word of captions of equal length costs."""
    counted = []
    for length in (7, 10):
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
    assert eager["operations"] <= 137
    assert (beams["graphs"], beams["waits"], beams["copies"]) == (1, 1, 1)
    assert beams["operations"] <= 80
    assert (wide["graphs"], wide["waits"], wide["copies"]) == (2, 1, 2), "one for the tokens that were left open"
    assert wide["operations"] == 2


GIB = 2**30


@pytest.mark.parametrize(("total", "expected"), [(79.6, 79), (79.1, 79), (24, 24), (0.5, 1)])
def test_caches_have_a_sixth_of_a_card_whatever_is_free_and_on_a_cpu_the_given_bytes(total, expected):
    with stand_in_cuda(int(total * GIB)):
        held = torch.zeros(2**20, device="cuda")
        assert (cache_bytes(held.device, 7), cache_bytes(torch.device("cpu"), 7)) == (expected * GIB // 6, 7)
