"""Weights of open_clip models as models of transformers.

A ViT and a text transformer of open_clip's own become a ``CLIPModel``. A tower of timm or of transformers becomes a
part of a ``VisionTextDualEncoderModel``. An image tower alone becomes a ``CLIPVisionModelWithProjection`` or a tower of
timm. What transformers cannot compute is refused with its name.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import transformers
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import nn
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPImageProcessor

from reinforce.reports import render_markdown
from reinforce.shipping.targets.base import ExportOptions, Run, Target, Tower, silenced
from reinforce.shipping.tokens import PROBES
from teachers.pixels import to_pixels
from teachers.protocols import ImageSpec

State = dict[str, torch.Tensor]
#: Names of a block's weights in open_clip and in transformers' CLIP.
_BLOCK = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
#: Biases of norms of timm, of which one is the last layer before the classifier.
_LAST_NORMS = ("timm_model.fc_norm.bias", "timm_model.head.norm.bias", "timm_model.norm.bias")
_GELUS = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}


@dataclass(frozen=True)
class _ModelPart:
    """A tower: its config in transformers, its weights by their names there, and its projection [D, width]."""

    config: Any
    state: State
    projection: torch.Tensor | None
    bias: torch.Tensor | None = None


def convert(clip: Any, config: Mapping[str, Any], tokens: torch.Tensor | None) -> Any:
    """Return an open_clip model in the class of transformers that computes the same, in float32 on the CPU.

    ``config`` is its ``model_cfg``; ``tokens`` are those of some texts, None for the image tower alone. Raises
    ValueError with what transformers lacks.
    """
    visual, tower = clip.visual, getattr(clip, "text", clip)
    if type(visual) is VisionTransformer:
        image = _vit(visual)
    elif isinstance(visual, open_clip.timm_model.TimmModel):
        image = _timm(visual, config["vision_cfg"])
    else:
        raise ValueError(f"transformers has no image tower like open_clip's {type(visual).__name__}")
    if tokens is None:
        return _image_model(image)
    is_own = isinstance(tower, open_clip.CLIP | TextTransformer)
    text = _clip_text(tower, tokens) if is_own else _transformers_text(tower)
    dim = int(config["embed_dim"])
    options = {"projection_dim": dim, "logit_scale_init_value": float(clip.logit_scale)}
    state = {"logit_scale": clip.logit_scale.reshape(())}
    image = _without_bias(image)
    for name, part in (("visual_projection", image), ("text_projection", text)):
        width = part.config.hidden_size
        state[f"{name}.weight"] = torch.eye(width) if part.projection is None else part.projection
    if isinstance(image.config, transformers.CLIPVisionConfig) and isinstance(text.config, transformers.CLIPTextConfig):
        both = transformers.CLIPConfig(
            text_config=text.config.to_dict(), vision_config=image.config.to_dict(), **options
        )
        model = transformers.CLIPModel(both)
    else:
        both = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(image.config, text.config, **options)
        model = transformers.VisionTextDualEncoderModel(both)
    for name, part in (("vision_model", image), ("text_model", text)):
        state |= {f"{name}.{key}": value for key, value in part.state.items()}
    return _loaded(model, state)


def _loaded(model: Any, state: State) -> Any:
    """Load weights into a model whose towers transformers 4 wraps once more. Raises ValueError."""
    expected = model.state_dict()
    for tower in ("vision_model", "text_model"):
        if any(key.startswith(f"{tower}.{tower}.") for key in expected):
            state = {f"{tower}.{key}" if key.startswith(f"{tower}.") else key: value for key, value in state.items()}
    wrong = sorted(
        {key for key in expected if key not in state and not key.endswith("position_ids")}
        | {key for key, value in state.items() if key not in expected or expected[key].shape != value.shape}
    )
    if wrong:
        raise ValueError(f"its weights do not fit transformers' {type(model).__name__}: {', '.join(wrong[:4])}")
    model.load_state_dict(state, strict=False)
    return model.float().eval().requires_grad_(False)


def _image_model(part: _ModelPart) -> Any:
    if isinstance(part.config, transformers.CLIPVisionConfig):
        part = _without_bias(part)
        projection = torch.eye(part.config.hidden_size) if part.projection is None else part.projection
        part.config.projection_dim = len(projection)
        state = {f"vision_model.{key}": value for key, value in part.state.items()}
        model = transformers.CLIPVisionModelWithProjection(part.config)
        return _loaded(model, {**state, "visual_projection.weight": projection})
    if part.projection is None:
        return _loaded(transformers.TimmWrapperModel(part.config), part.state)
    part.config.num_labels = len(part.projection)
    model = transformers.TimmWrapperForImageClassification(part.config)
    head = next(name for name, module in model.named_modules() if module is model.timm_model.get_classifier())
    bias = torch.zeros(len(part.projection)) if part.bias is None else part.bias
    return _loaded(model, {**part.state, f"{head}.weight": part.projection, f"{head}.bias": bias})


def _vit(visual: Any) -> _ModelPart:
    """Open_clip's ViT as a ``CLIPVisionModel``."""
    if visual.attn_pool is not None or visual.pool_type != "tok":
        pool = "by attention" if visual.attn_pool is not None else f"by `{visual.pool_type}`"
        raise ValueError(f"its image tower pools {pool}, and CLIPVisionModel takes the class token")
    own = visual.state_dict()
    projection = own.pop("proj", None)
    state = {
        "embeddings.class_embedding": own.pop("class_embedding"),
        "embeddings.position_embedding.weight": own.pop("positional_embedding"),
        "embeddings.patch_embedding.weight": own.pop("conv1.weight"),
        **_norms(own, {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}),
        **_blocks(own, "image"),
    }
    (height, width), patch = visual.image_size, visual.patch_size[0]
    if height != width:
        raise ValueError(f"its image tower takes images of {height} x {width}, and CLIPVisionModel square ones")
    config = transformers.CLIPVisionConfig(image_size=height, patch_size=patch, **_shape(visual.transformer, "image"))
    return _ModelPart(config, state, None if projection is None else projection.T.contiguous())


def _timm(visual: Any, config: Mapping[str, Any]) -> _ModelPart:
    """A tower of timm in transformers' wrapper, which has no classifier: open_clip uses that as the projection."""
    trunk, own = visual.trunk, dict(visual.trunk.state_dict().items())
    if any(".reparam_conv." in key for key in own):
        raise ValueError("its image tower is reparameterised for inference: export the weights before that")
    head = trunk.get_classifier()
    names = [name for name, module in trunk.named_modules() if module is head]
    projection = bias = None
    if isinstance(head, nn.Linear):
        projection, bias = head.weight, head.bias
        own = {key: value for key, value in own.items() if not key.startswith(f"{names[0]}.")}
    elif not isinstance(head, nn.Identity):
        raise ValueError(f"its image tower projects by a {type(head).__name__}, and transformers by a matrix")
    for name, module in visual.head.named_children():
        if isinstance(module, nn.Linear):
            projection, bias = module.weight, module.bias
        elif not isinstance(module, nn.Dropout):
            raise ValueError(f"its image tower ends with timm_{name}, which transformers' wrapper of timm lacks")
    options: dict[str, Any] = {"global_pool": config["timm_pool"]} if config.get("timm_pool") else {}
    size = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    if size is not None:
        options["img_size"] = list(size)
    wrapper = transformers.TimmWrapperConfig(
        architecture=config["timm_model_name"], model_args=options, hidden_size=trunk.num_features
    )
    return _ModelPart(wrapper, {f"timm_model.{key}": value for key, value in own.items()}, projection, bias)


def _without_bias(part: _ModelPart) -> _ModelPart:
    """Return a tower whose projection has no bias b, by adding d with W d = b to the bias of the norm before it."""
    if part.bias is None or not bool(part.bias.any()):
        return part
    name = next((key for key in _LAST_NORMS if key in part.state), None)
    assert part.projection is not None
    shift = torch.linalg.lstsq(part.projection.double(), part.bias.double(), driver="gelsd").solution
    missed = part.projection.double() @ shift - part.bias.double()
    if name is None or part.state[name].shape != shift.shape or float(missed.abs().max()) > 1e-6:
        raise ValueError(
            "its image tower's projection has a bias, which transformers' VisionTextDualEncoderModel lacks: export "
            "the image tower alone with --tower image, or another format"
        )
    state = {**part.state, name: (part.state[name].double() + shift).float()}
    return _ModelPart(part.config, state, part.projection)


def _clip_text(tower: Any, tokens: torch.Tensor) -> _ModelPart:
    """Open_clip's own text transformer as a ``CLIPTextModel``."""
    pool = tower.text_pool_type if isinstance(tower, open_clip.CLIP) else tower.pool_type
    if tower.attn_mask is None:
        raise ValueError(
            "its text tower lets tokens attend to later ones (no_causal_mask), and CLIPTextModel does not: export the "
            "image tower alone with --tower image, or another format"
        )
    if pool not in ("argmax", "eos") or getattr(tower, "cls_emb", None) is not None:
        raise ValueError(f"its text tower pools by `{pool}`, and CLIPTextModel at the end token")
    own = {key: value for key, value in tower.state_dict().items() if not key.startswith(("visual.", "logit_"))}
    projection = own.pop("text_projection", None)
    if projection is not None:
        projection = projection.T.contiguous()
    elif "text_projection.weight" in own:
        projection = own.pop("text_projection.weight")
        if bool(own.pop("text_projection.bias", torch.zeros(1)).any()):
            raise ValueError("its text tower's projection has a bias (proj_bias), which CLIPModel lacks")
    state = {
        "embeddings.token_embedding.weight": own.pop("token_embedding.weight"),
        "embeddings.position_embedding.weight": own.pop("positional_embedding"),
        **_norms(own, {"ln_final": "final_layer_norm"}),
        **_blocks(own, "text"),
    }
    end = getattr(tower, "text_eos_id", None) or getattr(tower, "eos_id", None) if pool == "eos" else None
    end_token = int(tokens.max()) if end is None else int(end)
    words, positions = (len(state[f"embeddings.{name}_embedding.weight"]) for name in ("token", "position"))
    config = transformers.CLIPTextConfig(
        vocab_size=words, max_position_embeddings=positions, eos_token_id=end_token, pad_token_id=end_token,
        bos_token_id=None, **_shape(tower.transformer, "text"),
    )  # fmt: skip
    return _ModelPart(config, state, projection)


def _transformers_text(tower: Any) -> _ModelPart:
    """A text tower of transformers, whose own pooling of the first token the dual encoder takes."""
    pooler = type(getattr(tower, "pooler", None)).__name__
    pools = getattr(tower.transformer, "pooler", None) is not None if hasattr(tower, "transformer") else False
    if pooler != "ClsPooler" or not pools:
        raise ValueError(
            f"its text tower pools by {pooler}, and transformers' VisionTextDualEncoderModel takes the model's own "
            "pooler (hf_pooler_type: cls_pooler): export the image tower alone with --tower image, or another format"
        )
    if not isinstance(tower.proj, nn.Linear | nn.Identity):
        raise ValueError("its text tower projects by several layers, and transformers by a matrix")
    projection = tower.proj.weight if isinstance(tower.proj, nn.Linear) else None
    config = copy.deepcopy(tower.config)
    config._name_or_path = ""  # where it was loaded from
    return _ModelPart(config, dict(tower.transformer.state_dict()), projection)


def _norms(own: State, names: Mapping[str, str]) -> State:
    return {
        f"{theirs}.{kind}": own.pop(f"{name}.{kind}")
        for name, theirs in names.items()
        for kind in ("weight", "bias")
        if f"{name}.{kind}" in own
    }


def _blocks(own: State, side: str) -> State:
    """The weights of a transformer's blocks by their names in CLIP. Raises ValueError if others are left."""
    state: State = {}
    for key in [key for key in own if key.startswith("transformer.resblocks.")]:
        number, _, rest = key.removeprefix("transformer.resblocks.").partition(".")
        name, _, kind = rest.rpartition(".")
        block = f"encoder.layers.{number}"
        if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
            parts = zip("qkv", own.pop(key).chunk(3), strict=True)
            state |= {f"{block}.self_attn.{one}_proj.{rest.rpartition('_')[2]}": value.clone() for one, value in parts}
        elif name == "attn.out_proj":
            state[f"{block}.self_attn.out_proj.{kind}"] = own.pop(key)
        elif name in _BLOCK:
            state[f"{block}.{_BLOCK[name]}.{kind}"] = own.pop(key)
    own.pop("attn_mask", None)
    if own:
        raise ValueError(f"its {side} tower has weights that transformers' CLIP lacks: {', '.join(sorted(own)[:4])}")
    return state


def _shape(transformer: Any, side: str) -> dict[str, Any]:
    """Width, depth, heads and activation of a transformer of open_clip. Raises ValueError for another activation."""
    block = transformer.resblocks[0]
    gelu = block.mlp.gelu
    kind = "quick_gelu" if type(gelu).__name__ == "QuickGELU" else _GELUS.get(getattr(gelu, "approximate", ""))
    if kind is None:
        raise ValueError(f"its {side} tower activates by {type(gelu).__name__}, which transformers' CLIP lacks")
    return {
        "hidden_size": len(block.ln_1.weight),
        "intermediate_size": len(block.mlp.c_fc.bias),
        "num_hidden_layers": len(transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": kind,
        "layer_norm_eps": block.ln_1.eps,
    }


FILE = "model.safetensors"
#: Classes of an image tower alone, with the name of what has its embeddings. AutoModel would load another class.
_IMAGE_OUTPUTS = {
    "CLIPVisionModelWithProjection": "image_embeds",
    "TimmWrapperModel": "pooler_output",
    "TimmWrapperForImageClassification": "logits",
}
_CLIP_TEXT = "clip_text_model"  # which ignores what is after the end token
_RESAMPLING = {"bilinear": 2, "bicubic": 3}  # of Pillow


class Transformers(Target):
    """A folder with model, image processor and tokenizer that ``from_pretrained`` and ``pipeline`` load."""

    title = "transformers"
    weights = ("fp32",)
    template = "export/transformers.md"
    fuses = False

    def __init__(self) -> None:
        self._model: Any = None

    def refuse(self, towers: Sequence[Tower], options: ExportOptions) -> None:
        image, texts = towers[0], next((tower for tower in towers if tower.name == "text"), None)
        spec = _spec(image)
        if not options.config:
            raise ValueError("it is no model of open_clip; of a model of timm, AutoModel loads the folder itself")
        if spec.resize == "crop" and spec.height != spec.width:
            raise ValueError(
                f"it crops images to {spec.height} x {spec.width}, and transformers' CLIPImageProcessor to squares"
            )
        with silenced():
            self._model = convert(image.module.clip, options.config, None if texts is None else texts.example(8))

    def convert(self, tower: Tower, folder: Path, options: ExportOptions) -> Path:
        """Write the model, with both towers in one file, and its image processor."""
        if tower.name == "image":
            with silenced():
                self._model.save_pretrained(folder)
                image = _spec(tower)
                size = {"height": image.height, "width": image.width}
                crop = image.resize == "crop"
                processor = CLIPImageProcessor(
                    size={"shortest_edge": image.height} if crop else size,
                    resample=_RESAMPLING[image.interpolation],
                    do_center_crop=crop,
                    crop_size=size,
                    image_mean=list(image.mean),
                    image_std=list(image.std),
                )
                processor.save_pretrained(folder)
        return folder / FILE

    def load(self, path: Path, threads: int | None = None) -> Run:
        (kind,) = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))["architectures"]
        with silenced():
            model = getattr(transformers, kind).from_pretrained(path.parent).eval()
        processor = CLIPImageProcessor.from_pretrained(path.parent)
        size = (processor.crop_size["height"], processor.crop_size["width"])
        image = ImageSpec(size, tuple(processor.image_mean), tuple(processor.image_std))
        text = getattr(model.config, "text_config", None)

        def run(rows: torch.Tensor) -> torch.Tensor:
            if rows.dtype == torch.uint8:
                pixels = to_pixels(rows, image)
                if text is None:
                    return normalize(model(pixel_values=pixels)[_IMAGE_OUTPUTS[kind]], dim=-1)
                return normalize(_pooled(model.get_image_features(pixel_values=pixels)), dim=-1)
            assert text is not None
            mask = None if text.model_type == _CLIP_TEXT else (rows != text.pad_token_id).long()
            return normalize(_pooled(model.get_text_features(input_ids=rows, attention_mask=mask)), dim=-1)

        return run

    def complete(self, folder: Path, tokenizer: Any) -> None:
        """Write what AutoTokenizer and AutoProcessor read, and compare the tokens of both tokenizers."""
        if tokenizer is None:
            return
        found = tokenizer.encode("a")
        used = [token for token, used in zip(found.tokens, found.attention_mask, strict=True) if used]
        pads = self._model.config.text_config.model_type != _CLIP_TEXT
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": used[0],
            "eos_token": used[-1],
            "pad_token": tokenizer.padding["pad_token"] if pads else used[-1],
            "model_max_length": len(found.ids),
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,  # those in texts are plain text
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tokenizer.no_padding()
        expected = [tokenizer.encode(text).ids for text in PROBES]
        tokenizer.no_truncation()  # transformers pads and cuts itself, and warns of a tokenizer that does
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        written = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        for text, ids in zip(PROBES, expected, strict=True):
            if written(text, truncation=True).input_ids != ids:
                raise ValueError(f"its tokenizer gives other tokens in transformers for {text[:60]!r}")

    def readme(self, config: Mapping[str, Any], image: ImageSpec) -> str:
        kind = type(self._model).__name__
        return render_markdown(
            self.template, model=config["model"], kind=kind, dim=config["dim"], context=config["context_length"],
            texts=config["context_length"] is not None, bias=config["logit_bias"] is not None,
            output=_IMAGE_OUTPUTS.get(kind),
        )  # fmt: skip


def _spec(tower: Tower) -> ImageSpec:
    spec: Any = tower.module.spec
    assert isinstance(spec, ImageSpec)
    return spec


def _pooled(features: Any) -> torch.Tensor:
    """The features of an image or text: transformers 5 returns more beside them."""
    found: torch.Tensor = features if isinstance(features, torch.Tensor) else features.pooler_output
    return found


TARGET = Transformers()
