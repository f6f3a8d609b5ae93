"""Tiny checkpoints with seeded weights, in the folders and formats of open_clip and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
#: Configs of towers of transformers.
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {
    **TOWER,
    "vocab_size": 300,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {**TOWER, "image_size": 32, "patch_size": 8}
#: Special tokens and the length of a tokenizer.
TOKENS: dict[str, Any] = {"start": "<s>", "end": "</s>", "pad": "<pad>", "length": 24}
SQUARE = {"height": 32, "width": 32}
PREPROCESS = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
#: Options of ``open_clip_model`` whose text towers are exact on trimmed texts.
TRIMMED: dict[str, dict[str, Any]] = {
    "small": {"image_size": 32, "embed_dim": 16},
    "large": {"image_size": 48, "width": 48, "embed_dim": 24, "seed": 1, "preprocess": {"mean": 0.5, "std": 0.5}},
    "custom-text": {"custom_text": True, "seed": 2},
    "eos-pooling": {"custom_text": True, "pool_type": "eos", "eos_id": 49407},
    "projection-bias": {"custom_text": True, "proj_bias": True},
    "no-projection": {"embed_dim": 32, "proj_type": "none"},
}
#: Options whose text towers need texts of full length, since they use positions after the end token.
FULL_LENGTH: dict[str, dict[str, Any]] = {
    "bidirectional": {"no_causal_mask": True},
    "last-token": {"custom_text": True, "pool_type": "last"},
    "class-token": {"custom_text": True, "embed_cls": True},
}


def open_clip_config(
    *, image_size: int = 32, width: int = 32, embed_dim: int = 16, context_length: int = 77, **text: Any
) -> dict[str, Any]:
    """A ``model_cfg`` with two layers per tower. ``text`` has further keys of its text_cfg."""
    vision = {"image_size": image_size, "layers": 2, "width": width, "head_width": 16, "patch_size": 8}
    heads = width // 16
    tower = {"context_length": context_length, "vocab_size": 49408, "width": width, "heads": heads, "layers": 2}
    return {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": {**tower, **text}}


def open_clip_model(
    folder: Path,
    *,
    image_size: int = 32,
    width: int = 32,
    embed_dim: int = 16,
    seed: int = 0,
    custom_text: bool = False,
    preprocess: dict[str, Any] | None = None,
    **text: Any,
) -> str:
    """Save a tiny open_clip model and return its name, ``local-dir:FOLDER``."""
    import open_clip

    config = open_clip_config(image_size=image_size, width=width, embed_dim=embed_dim, **text)
    build = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    model = seeded(lambda: build(**config), seed)
    if custom_text:
        config["custom_text"] = True
    return save_open_clip(folder, config, {"size": image_size, **PREPROCESS, **(preprocess or {})}, model)


def save_open_clip(folder: Path, config: dict[str, Any], preprocess: dict[str, Any], model: Any = None) -> str:
    """Save a model, or its configs alone -> its name, ``local-dir:FOLDER``."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(saved))
    if model is not None:
        save_file(model.state_dict(), str(folder / "open_clip_model.safetensors"))
    return f"local-dir:{folder}"


def open_clip_models(root: Path) -> dict[str, str]:
    """Save a model of each kind and return their names by kind."""
    return {name: open_clip_model(root / name, **kind) for name, kind in {**TRIMMED, **FULL_LENGTH}.items()}


def seeded(build: Any, seed: int) -> Any:
    """Build a module whose parameters all depend on the seed and are large enough for outputs to differ."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 0 and "logit" not in name:
                is_norm = name.endswith("weight") and ("ln" in name or "norm" in name.lower())
                torch.nn.init.normal_(parameter, mean=1.0 if is_norm else 0.0, std=0.1)
    return model.eval()


def tokenizer(folder: Path, *, start: str, end: str, pad: str, length: int) -> None:
    """Save a byte-level BPE tokenizer that lowercases texts and adds the start and end tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[pad, start, end], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["a photo of a cat and a photo of a dog"], trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, 1), (end, 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=start, eos_token=end, pad_token=pad, model_max_length=length
    )
    fast.save_pretrained(folder)


def save_transformers(
    folder: Path, model: Any, config: Any, processor: Any = None, tokens: dict[str, Any] | None = None
) -> str:
    """Save a model with seeded weights, the processor of its images, and a tokenizer -> the folder."""
    seeded(lambda: model(config), 0).save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    if tokens is not None:
        tokenizer(folder, **tokens)
    return str(folder)


def transformers_clip(folder: Path) -> str:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    config = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE)
    tokens = {**TOKENS, "start": "<|startoftext|>", "end": "<|endoftext|>"}
    return save_transformers(folder, CLIPModel, config, processor, tokens)


def transformers_siglip(folder: Path) -> str:
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    config = SiglipConfig(text_config=TEXT, vision_config=VISION)
    return save_transformers(folder, SiglipModel, config, SiglipImageProcessor(size=SQUARE), TOKENS)


def transformers_dinov2(folder: Path) -> str:
    """Save an image encoder."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    processor = BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
    return save_transformers(folder, Dinov2Model, config, processor)


def transformers_siglip_images(folder: Path) -> str:
    """Save the image tower of a SigLIP without its text tower."""
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    processor = SiglipImageProcessor(size=SQUARE)
    return save_transformers(folder, SiglipVisionModel, SiglipVisionConfig(**VISION), processor)


def transformers_bert(folder: Path) -> str:
    """Save a text encoder."""
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=300, max_position_embeddings=24, **TOWER)
    tokens = {**TOKENS, "start": "[CLS]", "end": "[SEP]", "pad": "[PAD]"}
    return save_transformers(folder, BertModel, config, tokens=tokens)


def timm_vit(folder: Path) -> str:
    """Save a model of timm as its ``save_for_hf`` does, and return its name, ``local-dir:FOLDER``."""
    import timm
    from timm.models import save_for_hf

    model = seeded(lambda: timm.create_model("test_vit", img_size=32), 0)
    save_for_hf(model, str(folder), model_args={"img_size": 32}, safe_serialization=True)
    return f"local-dir:{folder}"
