"""Cached decoding of CoCa compared with open_clip's full forward pass."""

from typing import Any

import open_clip
import pytest
import torch

from teachers.coca.decoder import CocaDecoder
from teachers.coca.network import CocaNetwork, check_decodable
from teachers.decoding.choosing import greedy
from teachers.decoding.decode import sample
from teachers.decoding.rules import DecodingRules
from teachers.device.accelerator import Accelerator
from tests.helpers.tiny_coca import coca_config
from tests.helpers.uncached_decoder import UncachedDecoder

VOCABULARY, START, END, LENGTH = 60, 58, 59, 8
#: Variants of the text tower, as keys of its ``text_cfg``.
TOWERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer scale": {"ls_init_value": 0.3},
    "query and key norms": {"qk_norm": True},
    "scaled heads": {"scale_heads": True},
    "norms inside": {"scale_attn_inner": True, "scale_attn": True, "scale_fc": True},
    "custom block without any of them": {"block_type": "custom"},
    "tanh": {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}},
    "another padding": {"pad_id": 7},
    "more layers, wider words": {"layers": 3, "mlp_ratio": 2.0},
    "a linear projection with bias": {"proj_bias": True},
}


def coca(text: dict[str, Any], **model: Any) -> Any:
    """A tiny CoCa with random parameters."""
    config = coca_config(vocab_size=VOCABULARY, **text)["model_cfg"]
    config["multimodal_cfg"].update(model.pop("multimodal", {}))
    config["vision_cfg"].update(model.pop("vision", {}))
    del config["custom_text"]
    coca_model = open_clip.CoCa(**config, **model)
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
    for batch in (images * torch.nan, images):  # the second reuses the caches of the first
        forward.begin(batch, 3)
        found = logits_of_steps(forward, 3)
    with Accelerator("cpu", precision).forward():
        wanted = logits_of_steps(UncachedDecoder(model, images), 3)
    assert [len(rows) for rows in found] == [3, 9, 9, 9, 4, 5, 5, 2]
    return max((a - b).abs().max().item() / b.abs().max().item() for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("text", TOWERS.values(), ids=TOWERS)
def test_logits_match_the_full_forward_pass_for_every_kind_of_text_tower(text):
    assert difference(coca(text)) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"quick_gelu": True},
        {"multimodal": {"ls_init_value": 0.3, "layers": 3}},
        {"multimodal": {"heads": 4}},
        {"vision": {"attentional_pool": False}},
        {"cast_dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_logits_match_the_full_forward_pass_for_every_kind_of_decoder(options):
    assert difference(coca({}, **options)) < 1e-5


def test_a_correct_class_token_mask_hides_the_padding_itself():
    model = coca({})
    model.text.correct_cls_mask = True
    assert difference(model) < 1e-5


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


def test_greedy_captions_match_those_without_a_cache():
    model = coca({"layers": 2})
    impossible = torch.zeros(VOCABULARY, dtype=torch.bool)
    impossible[START] = True
    rules = DecodingRules(START, END, impossible, min_tokens=2, max_tokens=40)
    images, drawn = image_tokens(model, 6), torch.ones(6, 1, 40)
    forward = build_decoder(model, length=40)
    forward.begin(images, 1)
    with torch.inference_mode():
        found = sample(forward, rules, greedy, drawn)
        assert found == sample(UncachedDecoder(model, images), rules, greedy, drawn)
    assert len({tuple(text) for [text] in found}) > 1


def test_caches_have_the_computed_size_and_are_reused():
    model = coca({})
    forward, images = build_decoder(model), image_tokens(model, 4)
    forward.begin(images, 3)
    caches = forward.cache, forward.image_cache
    assert sum(cache.nbytes for cache in caches) == 4 * forward.bytes_per_image(3, images.shape[1])
    forward.begin(images[:2], 3)
    assert forward.cache is caches[0]
    assert forward.image_cache is caches[1]


def test_unsupported_towers_are_rejected():
    with pytest.raises(ValueError, match="scaled_cosine_attn"):
        check_decodable(coca({"scaled_cosine_attn": True}))
    with pytest.raises(ValueError, match="not causal"):
        check_decodable(coca({"no_causal_mask": True}))
    odd = coca({})
    odd.text_decoder.resblocks[0].attn = torch.nn.Identity()
    with pytest.raises(ValueError, match="blocks of type ResidualAttentionBlock"):
        check_decodable(odd)
