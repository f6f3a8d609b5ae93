"""CoCa's blocks for one position, compared with open_clip's blocks over whole texts."""

from __future__ import annotations

import open_clip.transformer as towers
import pytest
import torch

from teachers.coca.blocks import CrossAttentionBlock, SelfAttentionBlock, check_block
from teachers.device.accelerator import Accelerator
from teachers.device.frozen import FrozenLinear

WIDTH, LENGTH = 16, 5


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.nn.Module:
    return FrozenLinear(weight, bias, Accelerator("cpu"))


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def test_self_attention_token_by_token_matches_the_whole_text() -> None:
    block = towers.ResidualAttentionBlock(WIDTH, 2).eval()
    x = _noise(3, LENGTH, WIDTH)
    causal = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
    single, cache = SelfAttentionBlock(block, _linear), torch.zeros(3, 2, LENGTH, WIDTH)
    steps = [single(x[:, i], cache, torch.tensor([i]), i + 1, None) for i in range(LENGTH)]
    torch.testing.assert_close(torch.stack(steps, dim=1), block(x, attn_mask=causal), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_cross_attention_shares_the_keys_of_an_image_between_its_captions() -> None:
    block = towers.ResidualAttentionBlock(WIDTH, 2, is_cross_attention=True).eval()
    x, images = _noise(3, WIDTH), _noise(2, 4, WIDTH, seed=1)
    single = CrossAttentionBlock(block, _linear)
    cache = single.keys_values(images)
    slots = torch.tensor([0, 2, 3])  # one caption of the first image and two of the second
    expected = block(x[:, None], k_x=images[[0, 1, 1]], v_x=images[[0, 1, 1]])[:, 0]
    torch.testing.assert_close(single(x, cache, slots, 2), expected, rtol=1e-4, atol=1e-5)


def test_unsupported_blocks_are_rejected() -> None:
    check_block(towers.ResidualAttentionBlock(WIDTH, 2))
    with pytest.raises(ValueError, match="blocks of type Identity are unknown"):
        check_block(torch.nn.Identity())


def test_an_attention_without_the_attribute_embed_dim_is_read() -> None:
    """open_clip's own attention modules do not have it."""
    block = towers.ResidualAttentionBlock(WIDTH, 2, is_cross_attention=True).eval()
    expected = CrossAttentionBlock(block, _linear).keys_values(_noise(2, 4, WIDTH))
    del block.attn.embed_dim
    assert torch.equal(CrossAttentionBlock(block, _linear).keys_values(_noise(2, 4, WIDTH)), expected)
