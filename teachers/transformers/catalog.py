"""Properties of a transformers model read from its files: modalities, dimension, weights. Does not import torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
#: Files besides the weights that determine the output for an image or a text.
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
#: Further files that determine captions: end tokens and the chat template.
CAPTIONER_FILES = ("generation_config.json", "chat_template.jinja", "chat_template.json")
#: Further files that determine translations: vocabularies of Marian.
TRANSLATOR_FILES = (*CAPTIONER_FILES, "source.spm", "target.spm", "target_vocab.json")
#: Model types whose texts are padded to the full length and not masked, as in training.
SIGLIP = ("siglip", "siglip2")
#: Model types that caption an image without a prompt, with the class that does.
IMAGE_TO_TEXT = {
    "blip": "BlipForConditionalGeneration",
    "git": "GitForCausalLM",
    "vision-encoder-decoder": "VisionEncoderDecoderModel",
}
#: Model types that translate a text, with the class that does. NLLB is of type m2m_100, MADLAD-400 of type t5.
TRANSLATORS = {
    "m2m_100": "M2M100ForConditionalGeneration",
    "marian": "MarianMTModel",
    "t5": "T5ForConditionalGeneration",
}
#: Model types that caption an image by a prompt.
CHAT_MODELS = (
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


def read_config(model: str) -> dict[str, Any] | None:
    """Read ``config.json`` of a local folder or of a downloaded hub model; None for a hub model not yet downloaded.

    Raises FileNotFoundError, ValueError.
    """
    if not is_local_folder(model):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model, "config.json")
        if not isinstance(cached, str):
            parent = Path(model).parent
            if parent.name and parent.is_dir():
                raise FileNotFoundError(
                    f"folder {model} does not exist. If it is a model of the Hugging Face Hub, download it first "
                    f"(hf download {model}), because {parent} is a folder here"
                )
            return None
        path = Path(cached)
    else:
        path = Path(model).expanduser() / "config.json"
        if not path.parent.is_dir():
            raise FileNotFoundError(f"folder {path.parent} does not exist")
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: use a folder written by save_pretrained")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{path} has no `model_type`: use a folder written by save_pretrained")
    return config


def is_local_folder(model: str) -> bool:
    """Whether a name is a local folder. Hub names are NAME or ORG/NAME; an existing folder takes precedence."""
    return Path(model).expanduser().is_dir() or model.startswith((".", "/", "~")) or model.count("/") > 1


def modalities(config: dict[str, Any] | None) -> tuple[bool, bool]:
    """Whether the model encodes (images, texts). Without a config, a dual encoder is assumed.

    Raises ValueError for a model that encodes neither.
    """
    if config is None or ("vision_config" in config and "text_config" in config):
        return True, True
    if "image_size" in config or "num_channels" in config:
        return True, False
    if "vocab_size" in config:
        return False, True
    raise ValueError(f"a model of type {config['model_type']!r} encodes neither images nor texts")


def embedding_dim(config: dict[str, Any] | None, pooling: str | None = None) -> int | None:
    """Length of the embeddings, None if the config does not contain it."""
    if config is None:
        return None
    if pooling == "summary":
        value = config["hidden_size"] * len(config["summary_idxs"]) if config.get("summary_idxs") else None
    elif config["model_type"] in SIGLIP:
        value = config["vision_config"].get("hidden_size")
    else:
        value = config.get("projection_dim" if modalities(config) == (True, True) else "hidden_size")
    return value if isinstance(value, int) else None


def content_files(folder: Path, extra: tuple[str, ...] = ()) -> list[Path]:
    """Files that determine the outputs of a local model, including those named in ``extra``.

    Raises FileNotFoundError if there are no weights.
    """
    for name in _WEIGHTS:
        if (folder / name).is_file():
            files = [folder / name]
            break
    else:
        raise FileNotFoundError(f"folder {folder} has no weights: expected {_WEIGHTS[0]} or {_WEIGHTS[2]}")
    if name.endswith(".index.json"):
        shards = set(json.loads(files[0].read_text(encoding="utf-8"))["weight_map"].values())
        files += [folder / shard for shard in sorted(shards)]
    return files + [folder / setting for setting in (*_SETTINGS, *extra) if (folder / setting).is_file()]
