"""Models of open_clip before they are loaded: names, tags, identities, and weights in the layout of their authors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import yaml
from timm.utils.model import reparameterize_model

from teachers.open_clip import catalog, released
from teachers.open_clip.building import build, from_authors
from teachers.open_clip.family import model_identity
from teachers.open_clip.teacher import load_model
from teachers.registry import describe_model, teacher_spec
from teachers.spec import ModelInfo
from tests.helpers.models import tiny_models


def test_every_tag_is_accepted_or_its_error_names_a_model_that_accepts_it() -> None:
    known = set(catalog.builtin_models())
    for model, tag in open_clip.list_pretrained():
        if model not in known:
            continue
        try:
            catalog.check_model(model, tag)
        except ValueError as error:
            other = str(error).rsplit(" ", 1)[-1]
            catalog.check_model(other, tag)


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-L14", "openai", "model 'ViT-L14' is unknown to open_clip; did you mean ViT-L-14"),
        ("MobileCLIP-S9", None, "'MobileCLIP-S9' is unknown to open_clip; did you mean MobileCLIP-S"),
        ("/tmp", None, "unknown to open_clip, and there is a folder of that name: write local-dir:/tmp$"),
        (__file__, None, "unknown to open_clip, and there is a file of that name: .* the file in `pretrained`"),
        ("./no/model", None, "write local-dir:PATH for the folder of a model, hf-hub:ORG/NAME for a model of the Hub"),
        ("ViT-B/31", None, "'ViT-B/31' is unknown to open_clip; did you mean ViT-B-32"),
        ("MobileCLIP-S3", "dfndr2b", "'dfndr2b' is neither a tag of MobileCLIP-S3 nor a checkpoint file"),
        ("ViT-L-14", "dnf2b", "'dnf2b' is neither a tag of ViT-L-14 nor a checkpoint file; did you mean dfn2b"),
        ("ViT-L-14", None, r"no weights without `pretrained`: set a checkpoint file or a tag \(openai"),
        ("ViT-L/14", "./epoch_9.pt", r"checkpoint \./epoch_9\.pt does not exist"),
        ("local-dir:/absent/folder", None, "folder /absent/folder does not exist"),
        ("local-dir:/tmp", "openai", "`pretrained` is not used with local-dir:"),
        ("hf-hub:apple/DFN2B-CLIP-ViT-L-14", "dfn2b", "`pretrained` is not used with hf-hub:"),
    ],
)
def test_wrong_names_are_rejected(models: dict[str, str], model: str, pretrained: str | None, message: str) -> None:
    model = models["small"] if model == "local-dir:/tmp" else model
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        catalog.check_model(model, pretrained)


def test_incomplete_folders_are_rejected(models: dict[str, str], tmp_path: Path) -> None:
    def check(error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            catalog.check_model(f"local-dir:{tmp_path}", None)

    config = tmp_path / "open_clip_config.json"
    check(FileNotFoundError, r"open_clip_config\.json does not exist")
    shutil.copy(catalog.local_folder(models["small"]) / config.name, config)
    check(FileNotFoundError, r" has no weights: expected open_clip_model\.safetensors")
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).touch()
    check(ValueError, r"several checkpoints \(a\.pt, b\.pt\): rename the one")
    config.write_text("{}")
    check(ValueError, "has no `model_cfg`")
    config.write_text("{")
    check(ValueError, "is not JSON")


def test_the_identity_of_a_folder_is_its_content_not_its_path(tmp_path: Path) -> None:
    model = tiny_models.open_clip_model(tmp_path / "a", embed_dim=24)
    info = describe_model("a", teacher_spec(model=model))
    assert (info.dim, info.images, info.texts) == (24, True, True)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert describe_model("b", teacher_spec(model=f"local-dir:{tmp_path / 'b'}")) == info
    others = [
        teacher_spec(model=model, precision="bf16"),
        teacher_spec(model=tiny_models.open_clip_model(tmp_path / "b", embed_dim=24, seed=1)),
        teacher_spec(model=tiny_models.open_clip_model(tmp_path / "c", embed_dim=24, preprocess={"std": 0.5})),
    ]
    assert info.identity not in [describe_model("a", other).identity for other in others]


def test_the_identity_of_a_checkpoint_is_its_content_and_of_a_tag_its_name(tmp_path: Path) -> None:
    def described(file: str) -> ModelInfo:
        return describe_model("a", teacher_spec(model="ViT-B-32", pretrained=str(tmp_path / file)))

    (tmp_path / "a.pt").write_bytes(b"weights")
    first = described("a.pt")
    (tmp_path / "a.pt").rename(tmp_path / "b.pt")
    assert described("b.pt") == first
    (tmp_path / "b.pt").write_bytes(b"others")
    assert described("b.pt") != first
    tagged = describe_model("a", teacher_spec(model="ViT-L/14", pretrained="dfn2b-s39b"))
    assert tagged.dim == 768
    assert tagged.identity == {
        "family": "open_clip", "model": "ViT-L-14", "pretrained": "dfn2b_s39b", "precision": "fp32",
    }  # fmt: skip


def preprocess_of(model: str, tag: str) -> dict[str, Any]:
    """The preprocessing of a tag in open_clip's own table, as a config writes it."""
    found = open_clip.get_pretrained_cfg(model, tag)
    channels = {key: [float(value) for value in found[key]] for key in ("mean", "std")}
    return {**channels, "interpolation": found["interpolation"], "resize_mode": found["resize_mode"]}


def test_a_file_of_a_released_model_needs_the_preprocessing_in_which_its_tags_differ(tmp_path: Path) -> None:
    file = str(tmp_path / "a.pt")
    Path(file).write_bytes(b"weights")
    weights = describe_model("a", teacher_spec(model="ViT-B-32", pretrained=file)).identity["weights"]
    refused = 0
    for model in set(catalog.builtin_models()) - released.WEIGHTS.keys():
        tags = {tag: preprocess_of(model, tag) for tag in open_clip.list_pretrained_tags_by_model(model)}
        # The fingerprint of right preprocessing is that of versions without the key.
        before = {"family": "open_clip", "precision": "fp32", "model": model, "weights": weights}
        if all(values == catalog.DEFAULT_PREPROCESS for values in tags.values()):
            assert describe_model("a", teacher_spec(model=model, pretrained=file)).identity == before
            continue
        refused += 1
        with pytest.raises(ValueError, match=r"does not state its preprocessing, .* add `preprocess: ") as caught:
            describe_model("a", teacher_spec(model=model, pretrained=file))
        offers = re.findall(r"`(preprocess: {.*?})` as its tag (\w+)", str(caught.value))
        assert offers
        for line, tag in offers:
            spec = teacher_spec(model=model, pretrained=file, **yaml.safe_load(line))
            identity = describe_model("a", spec).identity
            changed = identity.pop("preprocess", {})
            assert (identity, {**catalog.DEFAULT_PREPROCESS, **changed}) == (before, tags[tag])
    assert refused == 54


def test_the_folder_of_a_checkpoint_states_its_preprocessing(tmp_path: Path) -> None:
    stated = {"mean": 0.25, "std": [0.5, 0.5, 0.5], "interpolation": "bilinear", "size": 64}
    tiny_models.open_clip_model(tmp_path, preprocess=stated)

    def changed(file: str, **keys: Any) -> Any:
        spec = teacher_spec(model="MobileCLIP2-S0", pretrained=str(tmp_path / file), **keys)
        return describe_model("a", spec).identity["preprocess"]

    found = {"mean": [0.25] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}
    assert changed("open_clip_model.safetensors") == found
    mean = [0.1, 0.2, 0.3]
    assert changed("open_clip_model.safetensors", preprocess={"mean": mean}) == {**found, "mean": mean}
    (tmp_path / "other.pt").write_bytes(b"weights")
    with pytest.raises(ValueError, match="does not state its preprocessing"):
        changed("other.pt")  # the folder's config is that of other weights
    with pytest.raises(ValueError, match=r"add `preprocess: \{mean: \[0.0, 0.0, 0.0\], std: \[1.0, 1.0, 1.0\]\}`"):
        changed("other.pt", preprocess={"interpolation": "bilinear"})  # a part is not enough


def test_stated_preprocessing_replaces_that_of_tags_and_folders(tmp_path: Path) -> None:
    def identity(model: str, tag: str | None, **keys: Any) -> dict[str, Any]:
        return describe_model("a", teacher_spec(model=model, pretrained=tag, preprocess=keys)).identity

    folder = tiny_models.open_clip_model(tmp_path, preprocess={"mean": [0.5] * 3})
    for model, tag in (("MobileCLIP2-S0", "dfndr2b"), (folder, None)):
        own = json.loads((tmp_path / "open_clip_config.json").read_text())["preprocess_cfg"]
        own = own if tag is None else preprocess_of(model, tag)
        before = identity(model, tag)
        assert identity(model, tag, mean=own["mean"]) == before, "stated as it is"
        assert identity(model, tag, mean=[0.1] * 3) == {**before, "preprocess": {"mean": [0.1] * 3}}


#: Spellings of published names, with the model and tag in open_clip's; the names of other sizes differ by the size.
PUBLISHED = {
    "MobileCLIP-S0": ("MobileCLIP-S0", "datacompdr"),
    "mobileclip_blt": ("MobileCLIP-B", "datacompdr_lt"),
    "MobileCLIP-B (LT)": ("MobileCLIP-B", "datacompdr_lt"),
    "MobileCLIP-L/14": ("MobileCLIP-L-14", "datacompdr"),
    "apple/MobileCLIP2-S4": ("MobileCLIP2-S4", "dfndr2b"),
    "mobileclip2_l14": ("MobileCLIP2-L-14", "dfndr2b"),
}


def test_a_published_name_is_its_model_with_its_published_weights() -> None:
    for name, (model, tag) in {**released._PUBLISHED, **PUBLISHED}.items():
        assert model_identity(teacher_spec(model=name)) == model_identity(teacher_spec(model=model, pretrained=tag))
        assert catalog.model_config(name) == catalog.model_config(model)
        assert catalog.tag_config(name, tag)["hf_hub"].startswith(("apple/MobileCLIP", "timm/MobileCLIP2"))
    assert len(released._PUBLISHED) == 14


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
def test_released_weights_give_the_features_of_their_model(small: tuple[Any, Path], layout: str, fused: bool) -> None:
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
