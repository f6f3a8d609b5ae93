"""Models of Hugging Face transformers by hub name or local folder, as teachers and captioners.

What is known of one before it is loaded is read from its files, without torch: modalities, dimension, weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from teachers import weights
from teachers.decoding.postprocess import cleaning_identity
from teachers.spec import CHAT_FIELDS, CaptionReaderSpec, ModelInfo, ModelSpec, TeacherSpec
from teachers.tokens import check_tokenizer_files

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


#: Defaults of translators, whose texts may be as short as a word.
_TRANSLATION = {"strategy": "greedy", "captions": 1, "min_length": 0, "max_length": 128}
_STRATEGIES = ("greedy", "beams")
LANGUAGES = ("source_language", "target_language")


class _Transformers(ModelSpec):
    def hosts(self) -> Iterator[str]:
        if not is_local_folder(self.name):
            yield f"{weights.HUB} ({self.name})"

    def read_config(self) -> dict[str, Any] | None:
        if self.pretrained is not None:
            raise ValueError(
                "`pretrained` is not used with family transformers, whose models include their weights; remove it"
            )
        return read_config(self.name)

    def check_tokenizer(self) -> None:
        if is_local_folder(self.name):
            check_tokenizer_files(Path(self.name).expanduser())

    def identity(self, extra: tuple[str, ...] = ()) -> dict[str, Any]:
        """``extra`` are names of further files that determine the outputs of a local model."""
        identity: dict[str, Any] = {"family": "transformers", "precision": self.resolved_precision}
        if is_local_folder(self.name):
            files = content_files(Path(self.name).expanduser(), extra)
            identity["files"] = {path.name: weights.identity(path) for path in files}
        else:
            identity["model"] = self.model
        return identity


class TransformersTeacherSpec(_Transformers, TeacherSpec):
    loader: ClassVar[str] = "teachers.transformers.teacher:load"

    image_size: int | None = Field(
        None,
        ge=8,
        description="family transformers: side in pixels of the square image, for models that accept several sizes; "
        "default: the model's own",
    )
    pooling: Literal["cls", "mean", "summary"] | None = Field(
        None,
        description="family transformers, models of texts or images alone: which outputs become the embedding. mean: "
        "the mean of the text's tokens; cls: the first token; summary: C-RADIO's summary; default: mean for texts, the "
        "pooler if it has weights or else cls for images",
    )
    trust_remote_code: bool = Field(
        False,
        description="family transformers: run the code in the model's folder or repository, which can do anything; for "
        "models that transformers itself does not have",
    )
    lowercase: bool | None = Field(
        None,
        description="family transformers: texts in lower case, as SigLIP 2 needs; default: as the tokenizer does",
    )

    @property
    def imports(self) -> str | None:
        return self.model if self.trust_remote_code else None

    def describe(self) -> ModelInfo:
        config = self.read_config()
        images, texts = modalities(config)
        dim = embedding_dim(config, self.pooling)
        if texts:
            self.check_tokenizer()
        # ``lowercase: false`` is the default.
        keys = ("image_size", "pooling", "lowercase", "trust_remote_code")
        given = {key: value for key in keys if (value := getattr(self, key))}
        code = sorted(Path(self.name).expanduser().glob("*.py")) if self.trust_remote_code else ()
        identity = {**self.identity(tuple(path.name for path in code)), **given}
        return ModelInfo(dim=dim, images=images, texts=texts, identity=identity)


class TransformersCaptionerSpec(_Transformers, CaptionReaderSpec):
    source_language: str | None = Field(
        None,
        description="family transformers with `sees: caption`: language of the true captions, as the tokenizer names "
        "it, such as eng_Latn; for models of several source languages",
    )
    target_language: str | None = Field(
        None,
        description="family transformers with `sees: caption`: language of the translations, as the tokenizer names "
        "it, such as deu_Latn; for models of several target languages",
    )

    @model_validator(mode="before")
    @classmethod
    def _set_defaults_of_translators(cls, values: Any) -> Any:
        translates = isinstance(values, Mapping) and values.get("sees") == "caption"
        return {**_TRANSLATION, **values} if translates else values

    @model_validator(mode="after")
    def _check_translation(self) -> TransformersCaptionerSpec:
        if self.sees is None:
            if given := [key for key in LANGUAGES if getattr(self, key) is not None]:
                raise ValueError(f"`{given[0]}` is used only with `sees: caption`: add that, or remove the key")
        elif self.sees == "both":
            raise ValueError("`sees: both` is used only with family openai: translators see `caption` alone")
        elif self.strategy not in _STRATEGIES:
            raise ValueError(f"strategy {self.strategy} is not used with `sees: caption`: use greedy or beams")
        elif self.image_size is not None:
            raise ValueError("`image_size` is not used with `sees: caption`, by which no image is seen: remove it")
        return self

    @property
    def loader(self) -> str:  # type: ignore[override]
        return f"teachers.transformers.{'captioner' if self.sees is None else 'translator'}:load"

    def describe(self) -> ModelInfo:
        if fast := [key for key in self.fast_paths if getattr(self, key) is True]:
            raise ValueError(f"`{fast[0]}` works only with CoCa; remove it")
        self.check_config(self.read_config())
        self.check_tokenizer()
        keys = (*CHAT_FIELDS, "sees", *LANGUAGES)
        given = {key: value for key in keys if (value := getattr(self, key)) is not None}
        translates = self.sees is not None
        model = self.identity(TRANSLATOR_FILES if translates else CAPTIONER_FILES)
        identity = {**model, **self.decoding(), **given, **cleaning_identity(self.clean)}
        return ModelInfo(dim=None, images=not translates, texts=translates, identity=identity)

    def check_config(self, config: dict[str, Any] | None) -> None:
        """Raise ValueError if a model cannot caption or translate as the keys ask. Checks nothing without a config."""
        if config is None:
            return
        kind = config["model_type"]
        if self.sees is not None and kind not in TRANSLATORS:
            raise ValueError(
                f"`sees: {self.sees}` needs a sequence-to-sequence model of type {', '.join(TRANSLATORS)}; this one is "
                f"of type {kind!r}"
            )
        if self.sees is None and kind in TRANSLATORS:
            raise ValueError(
                f"a model of type {kind!r} sees no images: add `sees: caption`, to translate true captions"
            )
        if kind not in IMAGE_TO_TEXT and kind not in CHAT_MODELS and kind not in TRANSLATORS:
            raise ValueError(
                f"a model of type {kind!r} is not a supported captioner: use "
                f"{', '.join((*IMAGE_TO_TEXT, *CHAT_MODELS))}, an open_clip CoCa, or a custom `class`"
            )
        architectures = config.get("architectures") or []
        writer = {**IMAGE_TO_TEXT, **TRANSLATORS}.get(kind)
        if writer is not None and architectures and writer not in architectures:
            raise ValueError(f"{architectures[0]} does not write captions: use the weights of a {writer}")
        if kind in CHAT_MODELS and not self.prompt:
            raise ValueError(
                f'a model of type {kind!r} needs a prompt, such as prompt: "Describe the image in one sentence."'
            )
        for name in ("prompt", "image_size"):
            if kind in IMAGE_TO_TEXT and getattr(self, name) is not None:
                raise ValueError(f"`{name}` is not used by a model of type {kind!r}: remove it")
        text = config.get("decoder" if kind == "vision-encoder-decoder" else "text_config") or config
        positions = text.get("max_position_embeddings") or text.get("n_positions")
        if positions is not None and self.max_length > positions:
            raise ValueError(f"max_length {self.max_length} exceeds the model's context of {positions} tokens")
