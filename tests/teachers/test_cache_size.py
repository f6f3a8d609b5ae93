"""Bytes of the caches of captioners."""

import open_clip
import pytest
import torch

from teachers.coca.fixed_decoder import FixedCocaDecoder
from teachers.coca.network import CocaNetwork
from teachers.device.accelerator import Accelerator
from teachers.device.cache_size import cache_bytes
from tests.helpers.stand_in_cuda import stand_in_cuda

GIB = 2**30


def test_caches_on_a_cpu_have_the_given_bytes():
    assert cache_bytes(torch.device("cpu"), 7) == 7


@pytest.mark.parametrize(("total", "expected"), [(79.6, 79), (79.1, 79), (24, 24), (0.5, 1)])
def test_caches_on_cuda_have_a_sixth_of_the_card_whatever_is_free(total, expected):
    with stand_in_cuda(int(total * GIB)):
        held = torch.zeros(2**20, device="cuda")
        assert cache_bytes(held.device, 7) == expected * GIB // 6


def test_128_images_with_five_captions_of_coca_vit_l_14_are_one_part_on_a_card_of_40_gib():
    config = open_clip.get_model_config("coca_ViT-L-14")
    with torch.device("meta"):
        model = open_clip.CoCa(**{key: value for key, value in config.items() if key != "custom_text"})
        accelerator = Accelerator("meta", "bf16")
        decoder = FixedCocaDecoder(CocaNetwork(model, accelerator, 77 - 2, packed=False), accelerator)
    image = decoder.bytes_per_image(5, config["vision_cfg"].get("attn_pooler_queries", 256) - 1)
    assert 40e6 < image < 45e6
    with stand_in_cuda(40 * GIB):
        assert 128 * image < cache_bytes(torch.device("cuda"), 2 * GIB)
