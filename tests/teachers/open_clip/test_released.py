"""The published MobileCLIP models: their names, and their weights in the layout of their authors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from timm.utils.model import reparameterize_model

from teachers.open_clip import catalog
from teachers.open_clip.building import build, from_authors
from teachers.open_clip.family import model_identity
from teachers.open_clip.teacher import load_model
from teachers.registry import teacher_spec

PUBLISHED = {
    "MobileCLIP-S0": ("MobileCLIP-S0", "datacompdr"),
    "mobileclip_s1": ("MobileCLIP-S1", "datacompdr"),
    "apple/MobileCLIP-S2": ("MobileCLIP-S2", "datacompdr"),
    "MobileCLIP-B": ("MobileCLIP-B", "datacompdr"),
    "MobileCLIP-B (LT)": ("MobileCLIP-B", "datacompdr_lt"),
    "mobileclip_blt": ("MobileCLIP-B", "datacompdr_lt"),
    "MobileCLIP-S3": ("MobileCLIP-S3", "datacompdr"),
    "MobileCLIP-S4": ("MobileCLIP-S4", "datacompdr"),
    "MobileCLIP-L/14": ("MobileCLIP-L-14", "datacompdr"),
    "mobileclip2_s0": ("MobileCLIP2-S0", "dfndr2b"),
    "MobileCLIP2-S2": ("MobileCLIP2-S2", "dfndr2b"),
    "mobileclip2_b": ("MobileCLIP2-B", "dfndr2b"),
    "MobileCLIP2-S3": ("MobileCLIP2-S3", "dfndr2b"),
    "apple/MobileCLIP2-S4": ("MobileCLIP2-S4", "dfndr2b"),
    "mobileclip2_l14": ("MobileCLIP2-L-14", "dfndr2b"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_name_is_its_model_with_its_published_weights(name: str) -> None:
    model, tag = PUBLISHED[name]
    assert model_identity(teacher_spec(model=name)) == model_identity(teacher_spec(model=model, pretrained=tag))
    assert catalog.model_config(name) == catalog.model_config(model)
    assert catalog.tag_config(name, tag)["hf_hub"].startswith(("apple/MobileCLIP", "timm/MobileCLIP2"))


@pytest.mark.parametrize("size", ["S3", "S4", "L-14"])
def test_models_of_both_generations_differ_by_the_mask_of_the_texts_alone(size: str) -> None:
    first, second = (catalog.model_config(f"MobileCLIP{generation}-{size}") for generation in ("", "2"))
    masks = [config["text_cfg"].pop("no_causal_mask") for config in (first, second)]
    assert first == second
    assert masks == [size == "L-14", True]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """MobileCLIP-S0 with few words, whose text tower open_clip does not have, and the folder of its config."""
    config = catalog.model_config("MobileCLIP-S0")
    config["text_cfg"] |= {"vocab_size": 60, "width": 32, "heads": 2, "layers": 2}
    folder = tmp_path_factory.mktemp("s0")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.manual_seed(3)
    model = build(f"local-dir:{folder}").eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:  # they begin at 1e-5, at which no block matters
            torch.nn.init.uniform_(parameter, 0.1, 0.3)
    return model, folder


@pytest.mark.parametrize(("layout", "fused"), [("authors", False), ("authors", True), ("open_clip", True)])
def test_released_weights_give_the_features_of_the_model_that_they_were_taken_from(
    small: tuple[Any, Path], layout: str, fused: bool
) -> None:
    model, folder = small
    state = (reparameterize_model(model) if fused else model).state_dict()
    torch.save(authors_fastvit(state) if layout == "authors" else state, folder / "mobileclip_s0.pt")
    loaded = load_model(teacher_spec(model=f"local-dir:{folder}")).eval()
    assert loaded.state_dict().keys() == state.keys()
    for expected, found in zip(features(model), features(loaded), strict=True):
        if fused:
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(found, expected)


def test_released_weights_of_the_vision_transformer_get_the_names_of_open_clip() -> None:
    with torch.device("meta"):  # names and shapes alone
        model = open_clip.create_model("MobileCLIP-B", load_weights=False, device="meta")
    state = {key: torch.tensor(float(n)).expand(v.shape) for n, (key, v) in enumerate(model.state_dict().items())}
    state["visual.trunk.head.bias"] = torch.zeros(512)  # theirs has none
    renamed = from_authors(authors_vit(state), model)
    assert renamed.keys() == state.keys()
    assert all(torch.equal(renamed[key], state[key]) for key in state)


def features(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(60, (2, 77), generator=generator)
    with torch.no_grad():
        return model.encode_image(torch.rand(1, 3, 64, 64, generator=generator)), model.encode_text(tokens)


def authors_text(key: str) -> str:
    """The name in apple/ml-mobileclip's text encoder of a weight of open_clip's text tower."""
    for ours, theirs in (
        ("text.", "text_encoder."),
        ("text_projection", "projection_layer"),
        ("token_embedding", "embedding_layer"),
        ("positional_embedding", "positional_embedding.pos_embed.pos_embed"),
        ("ln_final", "final_layer_norm"),
        ("transformer.resblocks.", "transformer."),
        ("ln_1", "pre_norm_mha.0"),
        ("attn.in_proj_", "pre_norm_mha.1.qkv_proj."),
        ("attn.", "pre_norm_mha.1."),
        ("ln_2", "pre_norm_ffn.0"),
        ("mlp.c_fc", "pre_norm_ffn.1"),
        ("mlp.c_proj", "pre_norm_ffn.4"),
    ):
        key = key.replace(ours, theirs, 1)
    return key


def authors_fastvit(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights as apple/ml-mobileclip names them, of MobileCLIP-S0: four stages, with 6 and 7 for the last."""
    network = (0, 2, 4, 7)
    names: list[tuple[str, Any]] = [
        (r"stages\.(\d)\.downsample", lambda stage: f"network.{2 * int(stage[1]) - 1}"),
        (r"stages\.3\.pos_emb\.pos_enc", "network.6.pe"),
        (r"stages\.3\.pos_emb", "network.6"),
        (r"stages\.(\d)\.blocks", lambda stage: f"network.{network[int(stage[1])]}"),
        (r"(layer_scale(_\d)?)\.gamma", r"\1"),
        (r"(network\.[135]\.proj\.0)\.reparam_conv", r"\1.lkb_reparam"),
        ("stem", "patch_embed"),
        ("conv_kxk", "rbr_conv"),
        ("conv_scale", "rbr_scale"),
        ("identity", "rbr_skip"),
        ("final_conv", "conv_exp"),
        ("large_conv", "lkb_origin"),
        ("mlp", "convffn"),
        (r"se\.fc1", "se.reduce"),
        (r"se\.fc2", "se.expand"),
        (r"^head\.fc\.weight", "head.proj"),
    ]
    return in_layout_of_authors(state, "head.fc", names)


def authors_vit(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights as apple/ml-mobileclip names them, of MobileCLIP-B."""
    names = [
        (r"^patch_embed\.backbone\.(\d)\.conv", r"patch_emb.\1.block.conv"),
        (r"^patch_embed\.backbone\.(\d)\.bn", r"patch_emb.\1.block.norm"),
        (r"^pos_embed", "pos_embed.pos_embed.pos_embed"),
        (r"^norm\.", "post_transformer_norm."),
        ("norm1", "pre_norm_mha.0"),
        (r"attn\.qkv", "pre_norm_mha.1.qkv_proj"),
        (r"attn\.proj", "pre_norm_mha.1.out_proj"),
        ("norm2", "pre_norm_ffn.0"),
        (r"mlp\.fc1", "pre_norm_ffn.1"),
        (r"mlp\.fc2", "pre_norm_ffn.4"),
        (r"^blocks\.", "transformer."),
        (r"^head\.weight", "classifier.proj"),
    ]
    return in_layout_of_authors(state, "head", names)


def in_layout_of_authors(
    state: dict[str, torch.Tensor], head: str, names: list[tuple[str, Any]]
) -> dict[str, torch.Tensor]:
    """Rename weights; the projection is transposed and has no bias, positions have one or two more dimensions."""
    result = {}
    for key, value in state.items():
        name = key.removeprefix("visual.trunk.")
        if key == name:
            result[authors_text(key)] = value[None, None] if key == "text.positional_embedding" else value
        elif name != f"{head}.bias":
            shaped = value.T if name == f"{head}.weight" else value[None] if name == "pos_embed" else value
            for ours, theirs in names:
                name = re.sub(ours, theirs, name)
            result[f"image_encoder.model.{name}"] = shaped
    return result
