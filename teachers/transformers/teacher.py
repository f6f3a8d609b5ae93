"""Teachers of Hugging Face transformers by hub name or local folder: CLIP, SigLIP, image-only and text-only models."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from math import isqrt
from typing import Any, Literal, cast

import torch
import transformers

from teachers import weights
from teachers.fast_paths import towers
from teachers.image_encoder import ImageEncoder, unit
from teachers.pixels import channels
from teachers.protocols import ImageSpec, Teacher
from teachers.runtime.accelerator import Accelerator
from teachers.tokens import PROBE_TEXTS, special_token_escaper, trimming_is_exact
from teachers.transformers.family import SIGLIP, TransformersTeacherSpec, is_local_folder, modalities, read_config

_log = logging.getLogger(__name__)
_PATCHES = "max_num_patches"  # in an image processor's config: that of a NaFlex model
_RESAMPLING: dict[int, Literal["nearest", "bilinear", "bicubic"]] = {0: "nearest", 2: "bilinear", 3: "bicubic"}


def load(spec: TransformersTeacherSpec, accelerator: Accelerator) -> Teacher:
    """Load the teacher of a spec, with both encoders or the one that the model has.

    Raises ValueError for a model that cannot be a teacher or lacks weights; OSError for a model that does not exist.
    """
    if is_local_folder(spec.name):
        read_config(spec.name)  # has better error messages for folders than transformers
    with _own_code(spec):
        config = transformers.AutoConfig.from_pretrained(spec.name, trust_remote_code=spec.trust_remote_code)
        images, texts = modalities(config.to_dict())
        if images and texts:
            return TransformersTeacher(spec, accelerator)
        return cast(Teacher, ImageTeacher(spec, accelerator) if images else TextTeacher(spec, accelerator))


@contextmanager
def _own_code(spec: TransformersTeacherSpec) -> Iterator[None]:
    """Name the key that allows the code of a model, which the processes of a node copy and import one by one."""
    with weights.locked(f"transformers {spec.name}") if spec.trust_remote_code else nullcontext():
        try:
            yield
        except ValueError as error:
            if spec.trust_remote_code or "trust_remote_code" not in str(error):
                raise
            raise ValueError(
                f"{spec.name} needs code in its own folder or repository, which can do anything. Read it, and set "
                "`trust_remote_code: true` to run it"
            ) from error


class TransformersTeacher(ImageEncoder):
    """A dual encoder: any model with ``get_image_features`` and ``get_text_features``, such as CLIP and SigLIP 2.

    Texts are padded to the longest of the batch and masked; the constructor checks this against the full length.
    SigLIP was trained on texts padded to the full length without a mask, so it gets texts of full length. A NaFlex
    model gets the patches of square images of one size.
    """

    def __init__(self, spec: TransformersTeacherSpec, accelerator: Accelerator) -> None:
        model, _ = _load_model(spec, accelerator)
        for method in ("get_image_features", "get_text_features"):
            if not hasattr(model, method):
                raise ValueError(f"{type(model).__name__} has no `{method}`: it is not a dual encoder")
        if spec.pooling is not None:
            raise ValueError(f"`pooling` is not used by {type(model).__name__}, a dual encoder; remove it")
        processor = _load_processor(spec)
        image = image_spec(processor, square_size(processor, spec.image_size))
        patch = processor["patch_size"] if _PATCHES in processor else None
        inputs = partial(_patch_inputs, patch=patch) if patch else lambda pixels: {"pixel_values": pixels}
        super().__init__(
            model, image, accelerator, lambda pixels: _features(model.get_image_features(**inputs(pixels))), inputs
        )
        siglip = model.config.model_type in SIGLIP
        positions = model.config.text_config.max_position_embeddings
        self._tokenize = _Tokenizer(spec, positions, masked=not siglip)
        if siglip and spec.lowercase is None:
            self._tokenize.check_case()
        with _first_input(model):
            self.dim = self._embed_black().shape[1]
            self._trims = not siglip and trimming_is_exact(self._encode)
        self._make_fast(getattr(model, "vision_model", model), spec)
        scale = getattr(model, "logit_scale", None)
        self.logit_scale = spec.logit_scale or (float(scale.exp()) if scale is not None else None)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """B strings -> [B, dim] float32, unit norm."""
        with self._accelerator.forward():
            return unit(self._encode(texts, trim=self._trims))

    def _encode(self, texts: Sequence[str], trim: bool) -> torch.Tensor:
        return _features(
            self._model.get_text_features(**self._tokenize(texts, self._accelerator, full_length=not trim))
        )


class ImageTeacher(ImageEncoder):
    """An image encoder (DINOv3, C-RADIO, ViT, ...): its pooled output if the pooler has weights, else its CLS token.

    ``pooling`` chooses: the CLS token, or C-RADIO's summary, which is several class tokens in a row.
    """

    def __init__(self, spec: TransformersTeacherSpec, accelerator: Accelerator) -> None:
        model, pools = _load_model(spec, accelerator)
        self._pools = pools and spec.pooling is None
        self._summary = spec.pooling == "summary"
        if spec.pooling is None and model.config.model_type == "radio":
            _log.warning("%s: set `pooling: summary` to get all class tokens, not the first alone", spec.model)
        processor = _load_processor(spec)
        image = image_spec(processor, square_size(processor, spec.image_size))
        super().__init__(model, image, accelerator, self._pooled)
        if spec.pooling == "mean" or spec.lowercase is not None:
            raise ValueError(
                "`lowercase` and `pooling: mean` are for texts, which this model does not encode; remove it"
            )
        self.logit_scale = spec.logit_scale
        with _first_input(model):
            self.dim = self._embed_black().shape[1]
        self._make_fast(getattr(model, "vision_model", model), spec)

    def _pooled(self, pixels: torch.Tensor) -> torch.Tensor:
        output = self._model(pixel_values=pixels)
        if self._summary:
            summary: torch.Tensor | None = getattr(output, "summary", None)
            if summary is None:
                raise ValueError("it has no summary, which only C-RADIO has: remove `pooling: summary`")
            return summary
        pooled = getattr(output, "pooler_output", None) if self._pools else None
        features: torch.Tensor = output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)
        return features


class TextTeacher:
    """A text encoder (BERT, sentence encoders, ...): the mean of its last hidden states over all tokens but padding.

    ``pooling: cls`` takes the first token instead.
    """

    image = None

    def __init__(self, spec: TransformersTeacherSpec, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._model, _ = _load_model(spec, accelerator)
        if spec.image_size or spec.pooling == "summary":
            raise ValueError(
                "`image_size` and `pooling: summary` are for images, which this model does not encode; remove it"
            )
        self._mean = spec.pooling != "cls"
        positions: int = getattr(self._model.config, "max_position_embeddings", 512)
        padding = getattr(getattr(self._model, "embeddings", None), "padding_idx", None)
        if padding is not None:  # RoBERTa's positions start after the index of the padding token
            positions -= padding + 1
        self._tokenize = _Tokenizer(spec, positions, masked=True)
        self.logit_scale = spec.logit_scale
        with _first_input(self._model):
            self.dim = self.encode_texts(PROBE_TEXTS).shape[1]
        if spec.compile:
            raise ValueError("`compile` is for image towers, and this model has none; remove it")
        if spec.precision == "fp8":
            raise ValueError("`precision: fp8` is for image towers, and this model has none: set bf16 or auto")
        towers.freeze(self, self._model, accelerator, spec)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """B strings -> [B, dim] float32, unit norm."""
        with self._accelerator.forward():
            tokens = self._tokenize(texts, self._accelerator)
            hidden = self._model(**tokens).last_hidden_state.float()
            mask = tokens["attention_mask"].unsqueeze(-1)
            if not self._mean:
                first = mask[..., 0].argmax(dim=1)  # not 0 where the tokenizer pads on the left
                return unit(hidden[torch.arange(len(hidden), device=hidden.device), first])
            return unit((hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1))


class _Tokenizer:
    """The model's tokenizer, with special tokens in texts escaped."""

    def __init__(self, spec: TransformersTeacherSpec, positions: int, masked: bool) -> None:
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(
            spec.model, trust_remote_code=spec.trust_remote_code
        )
        if self._tokenizer.pad_token is None:
            raise ValueError(f"the tokenizer of {spec.model} has no padding token")
        self._escape = special_token_escaper(self._tokenizer.all_special_tokens)
        # tokenizers without a limit report a huge model_max_length
        self._length = min(positions, self._tokenizer.model_max_length)
        self._masked = masked
        self._lower = bool(spec.lowercase)

    def check_case(self) -> None:
        """Raise ValueError for SigLIP 2, which was trained on lower-cased texts, if this tokenizer keeps capitals.

        SigLIP's first version has a tokenizer of its own, which need not be checked.
        """
        gemma = type(self._tokenizer).__name__.startswith(("Gemma", "Siglip2"))
        capital, small = (self._tokenizer(text)["input_ids"] for text in ("A PHOTO", "a photo"))
        if gemma and capital != small:
            raise ValueError(
                "SigLIP 2 was trained on lower-cased texts, and the tokenizer of this model keeps capitals: set "
                "`lowercase: true`, or `lowercase: false` to continue a dataset whose texts were encoded with capitals"
            )

    def __call__(
        self, texts: Sequence[str], accelerator: Accelerator, full_length: bool = False
    ) -> dict[str, torch.Tensor]:
        tokens = self._tokenizer(
            [self._escape(text.lower() if self._lower else text) for text in texts],
            padding="max_length" if full_length else "longest",
            truncation=True,
            max_length=self._length,
            return_attention_mask=self._masked,
            return_tensors="pt",
        )
        names = [name for name in tokens if self._masked or name == "input_ids"]
        return {name: accelerator.put(tokens[name]) for name in names}


def image_spec(config: dict[str, Any], side: int | None = None) -> ImageSpec:
    """Convert an image processor's config to an ImageSpec. Raises ValueError if that is not possible.

    A margin (DINOv2 resizes to 256 and crops 224) is dropped: the shorter side is resized to the crop. ``side`` is
    the side of square images, in place of the config's size.
    """
    crop = config.get("crop_size") if config.get("do_center_crop") else None
    size = config.get("size")
    if isinstance(size, int):
        size = {"shortest_edge": size} if crop else {"height": size, "width": size}
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    frame = {"height": side, "width": side} if side else crop or size or {}
    if not (side or config.get("do_resize", True)) or "height" not in frame or "width" not in frame:
        raise ValueError(
            f"images have no fixed size (size {size}, crop_size {crop}): set `image_size`, the side in pixels"
        )
    if not config.get("do_rescale", True) or abs(config.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise ValueError(f"pixels are not scaled by 1/255 (rescale_factor {config.get('rescale_factor')})")
    resample = int(config.get("resample", 3))
    if resample not in _RESAMPLING:
        raise ValueError(f"images are resized by Pillow's filter {resample}, not by nearest, bilinear or bicubic")
    normalizes = config.get("do_normalize", True)
    height, width = int(frame["height"]), int(frame["width"])
    return ImageSpec(
        size=height if height == width else (height, width),
        mean=channels(config["image_mean"]) if normalizes else (0.0, 0.0, 0.0),
        std=channels(config["image_std"]) if normalizes else (1.0, 1.0, 1.0),
        interpolation=_RESAMPLING[resample],
        resize="crop" if size and "shortest_edge" in size else "squash",
    )


def square_size(processor: dict[str, Any], size: int | None) -> int | None:
    """Side of the images of a NaFlex model in pixels; ``size`` as it is for other models.

    Without ``size`` it is that of the largest square image whose patches the processor does not reduce.
    Raises ValueError for a size that is not a multiple of the patch.
    """
    if _PATCHES not in processor:
        return size
    patch = int(processor["patch_size"])
    if size is not None and size % patch:
        near = max(1, round(size / patch)) * patch
        raise ValueError(f"`image_size: {size}` is not a multiple of the model's patch of {patch} pixels: use {near}")
    return size or isqrt(int(processor["max_num_patches"])) * patch


def _patch_inputs(pixels: torch.Tensor, patch: int) -> dict[str, torch.Tensor]:
    """Pixels [B, 3, H, W] -> inputs of a NaFlex model, whose N patches are in row order with channels last.

    ``pixel_values`` [B, N, patch * patch * 3], ``pixel_attention_mask`` [B, N] and ``spatial_shapes`` [B, 2].
    """
    batch, channels, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    grid = pixels.reshape(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
    return {
        "pixel_values": grid.reshape(batch, rows * columns, patch * patch * channels),
        "pixel_attention_mask": pixels.new_ones((batch, rows * columns), dtype=torch.int32),
        "spatial_shapes": torch.tensor([[rows, columns]] * batch),  # on the CPU, since the model compares its values
    }


def _load_processor(spec: TransformersTeacherSpec) -> dict[str, Any]:
    processor = transformers.AutoImageProcessor.from_pretrained(spec.model, trust_remote_code=spec.trust_remote_code)
    config: dict[str, Any] = processor.to_dict()
    return config


def _load_model(spec: TransformersTeacherSpec, accelerator: Accelerator) -> tuple[Any, bool]:
    """Load the model -> (model, whether its pooler has weights). Hub downloads use huggingface_hub's file locks."""
    model, report = transformers.AutoModel.from_pretrained(
        spec.model, trust_remote_code=spec.trust_remote_code, output_loading_info=True
    )
    missing = sorted(report["missing_keys"])
    # Checkpoints with other heads often lack the pooler, which is then not used. Other missing weights are an error.
    needed = [key for key in missing if not key.startswith("pooler.")]
    if needed or report["mismatched_keys"]:
        wrong = [*needed, *map(str, report["mismatched_keys"])]
        raise ValueError(f"the weights of {spec.model} do not fit {type(model).__name__}: {', '.join(wrong[:5])}")
    return accelerator.prepare(model.float()), not missing


@contextmanager
def _first_input(model: Any) -> Iterator[None]:
    """Name the model in errors of its first forward pass."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be a teacher: {type(error).__name__}: {error}") from error


def _features(output: Any) -> torch.Tensor:
    """Unwrap the embeddings, which transformers 5 returns in a model output."""
    features: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return features
