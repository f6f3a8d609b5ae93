"""What a transformers model is, from its files alone: its sides, its dimension, its weights. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from teachers.spec import CaptionerSpec

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
#: What beside the weights decides the output for an image or a text.
_SETTINGS = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)

#: What decides a caption beside them: end tokens, and how a prompt is framed.
CAPTIONER_SETTINGS = ("generation_config.json", "chat_template.jinja", "chat_template.json")
#: Models that write captions of an image alone, and the class that does.
CAPTIONERS = {
    "blip": "BlipForConditionalGeneration",
    "git": "GitForCausalLM",
    "vision-encoder-decoder": "VisionEncoderDecoderModel",
}
#: Models that are asked for one.
CHAT = (
    "gemma3",
    "idefics3",
    "internvl",
    "llava",
    "llava_next",
    "llava_onevision",
    "paligemma",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
    "smolvlm",
)


def config_of(model: str) -> dict[str, Any] | None:
    """``config.json`` of a local folder, or of a hub model that was downloaded before; None if it was not.

    Raises FileNotFoundError, ValueError.
    """
    if not is_folder(model):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model, "config.json")
        if not isinstance(cached, str):
            return None
        path = Path(cached)
    else:
        path = Path(model).expanduser() / "config.json"
        if not path.parent.is_dir():
            raise FileNotFoundError(f"folder {path.parent} is not there")
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: want a folder as save_pretrained writes it")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{path} names no `model_type`: want a folder as save_pretrained writes it")
    return config


def is_folder(model: str) -> bool:
    """Whether a name means a local folder: hub names are NAME or ORG/NAME and no folder is called so here."""
    return Path(model).expanduser().is_dir() or model.startswith((".", "/", "~")) or model.count("/") > 1


def sides(config: dict[str, Any] | None) -> tuple[bool, bool]:
    """Whether the model encodes images, and texts. A model that is not known yet is taken for a dual encoder.

    Raises ValueError for a model that does neither.
    """
    if config is None or ("vision_config" in config and "text_config" in config):
        return True, True
    if "image_size" in config or "num_channels" in config:
        return True, False
    if "vocab_size" in config:
        return False, True
    raise ValueError(f"a model of type {config['model_type']!r} encodes neither images nor texts")


def dimension(config: dict[str, Any] | None) -> int | None:
    """Of the embeddings, where the config says so."""
    if config is None:
        return None
    if config["model_type"] == "siglip":
        value = config["vision_config"].get("hidden_size")
    else:
        value = config.get("projection_dim" if sides(config) == (True, True) else "hidden_size")
    return value if isinstance(value, int) else None


def content_files(folder: Path, also: tuple[str, ...] = ()) -> list[Path]:
    """The files that decide a local model's outputs, ``also`` among them. Raises FileNotFoundError if there are no
    weights."""
    for name in _WEIGHTS:
        if (folder / name).is_file():
            files = [folder / name]
            break
    else:
        raise FileNotFoundError(f"folder {folder} holds no weights: want {_WEIGHTS[0]} or {_WEIGHTS[2]}")
    if name.endswith(".index.json"):
        shards = set(json.loads(files[0].read_text(encoding="utf-8"))["weight_map"].values())
        files += [folder / shard for shard in sorted(shards)]
    return files + [folder / setting for setting in (*_SETTINGS, *also) if (folder / setting).is_file()]


def check_captioner(config: dict[str, Any] | None, spec: CaptionerSpec) -> None:
    """Raises ValueError where a model does not caption, or not as the spec wants. One not known yet is taken to."""
    if config is None:
        return
    kind = config["model_type"]
    if kind not in CAPTIONERS and kind not in CHAT:
        raise ValueError(
            f"a model of type {kind!r} is no captioner that is supported: want {', '.join((*CAPTIONERS, *CHAT))}, an "
            "open_clip CoCa, or a `class` of your own"
        )
    architectures = config.get("architectures") or []
    if kind in CAPTIONERS and architectures and CAPTIONERS[kind] not in architectures:
        raise ValueError(f"{architectures[0]} does not write captions: want the weights of a {CAPTIONERS[kind]}")
    if kind in CHAT and not spec.prompt:
        raise ValueError(f'a model of type {kind!r} must be asked: prompt: "Describe the image in one sentence."')
    for name in ("prompt", "image_size"):
        if kind in CAPTIONERS and getattr(spec, name) is not None:
            raise ValueError(f"`{name}` is not used by a model of type {kind!r}: remove it")
    text = config.get("decoder" if kind == "vision-encoder-decoder" else "text_config") or config
    positions = text.get("max_position_embeddings") or text.get("n_positions")
    if positions is not None and spec.max_length > positions:
        raise ValueError(f"max_length {spec.max_length} exceeds the model's context of {positions} tokens")
