"""Teachers of Hugging Face transformers by hub name or local folder: CLIP, SigLIP, image-only and text-only models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import transformers

from teachers import towers
from teachers import transformers_catalog as catalog
from teachers.device import Accelerator
from teachers.pixels import channels
from teachers.protocols import ImageSpec, Teacher
from teachers.spec import TeacherSpec
from teachers.special_tokens import special_token_escaper
from teachers.trimming import PROBE_TEXTS, trimming_is_exact

_RESAMPLING: dict[int, Literal["nearest", "bilinear", "bicubic"]] = {0: "nearest", 2: "bilinear", 3: "bicubic"}

EncodeImages = Callable[[torch.Tensor], torch.Tensor]


def load(spec: TeacherSpec, accelerator: Accelerator) -> Teacher:
    """Load the teacher of a spec, with both encoders or the one that the model has.

    Raises ValueError for a model that cannot be a teacher or lacks weights; OSError for a model that does not exist.
    """
    assert spec.model is not None
    if catalog.is_local_folder(spec.model):
        catalog.read_config(spec.model)  # has better error messages for folders than transformers
    config = transformers.AutoConfig.from_pretrained(spec.model, trust_remote_code=False)
    images, texts = catalog.modalities(config.to_dict())
    if images and texts:
        return TransformersTeacher(spec, accelerator)
    return cast(Teacher, ImageTeacher(spec, accelerator) if images else TextTeacher(spec, accelerator))


class TransformersTeacher:
    """A dual encoder: any model with ``get_image_features`` and ``get_text_features``.

    Texts are padded to the longest of the batch and masked; the constructor checks this against the full length.
    SigLIP was trained on texts padded to the full length without a mask, so it gets texts of full length.
    """

    def __init__(self, spec: TeacherSpec, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._model, _ = _load_model(spec, accelerator)
        for method in ("get_image_features", "get_text_features"):
            if not hasattr(self._model, method):
                raise ValueError(f"{type(self._model).__name__} has no `{method}`: it is not a dual encoder")
        self.image: ImageSpec | None = _load_image_spec(spec)
        siglip = self._model.config.model_type == "siglip"
        positions = self._model.config.text_config.max_position_embeddings
        self._tokenize = _Tokenizer(spec, positions, masked=not siglip)
        self._encode_images: EncodeImages = self._image_features
        with _first_input(self._model):
            self.dim = _image_dim(self.encode_images, self.image, accelerator)
            self._trims = not siglip and trimming_is_exact(self._encode)
        self._encode_images = _make_fast(self, self._model, spec, accelerator, self._image_features)
        scale = getattr(self._model, "logit_scale", None)
        self.logit_scale = spec.logit_scale or (float(scale.exp()) if scale is not None else None)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] float32 -> [B, dim] float32, unit norm."""
        with self._accelerator.forward():
            return _unit(self._encode_images(self._accelerator.layout(pixels)))

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return _features(self._model.get_image_features(pixel_values=pixels))

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """B strings -> [B, dim] float32, unit norm."""
        with self._accelerator.forward():
            return _unit(self._encode(texts, trim=self._trims))

    def _encode(self, texts: Sequence[str], trim: bool) -> torch.Tensor:
        return _features(
            self._model.get_text_features(**self._tokenize(texts, self._accelerator, full_length=not trim))
        )


class ImageTeacher:
    """An image encoder (DINOv2, ViT, ...): its pooled output if the pooler has weights, else its CLS token."""

    def __init__(self, spec: TeacherSpec, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._model, self._pools = _load_model(spec, accelerator)
        self.image: ImageSpec | None = _load_image_spec(spec)
        self.logit_scale = spec.logit_scale
        self._encode_images: EncodeImages = self._pooled
        with _first_input(self._model):
            self.dim = _image_dim(self.encode_images, self.image, accelerator)
        self._encode_images = _make_fast(self, self._model, spec, accelerator, self._pooled)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] float32 -> [B, dim] float32, unit norm."""
        with self._accelerator.forward():
            return _unit(self._encode_images(self._accelerator.layout(pixels)))

    def _pooled(self, pixels: torch.Tensor) -> torch.Tensor:
        output = self._model(pixel_values=pixels)
        pooled = getattr(output, "pooler_output", None) if self._pools else None
        features: torch.Tensor = output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)
        return features


class TextTeacher:
    """A text encoder (BERT, ...): the mean of its last hidden states over all tokens but padding."""

    image = None

    def __init__(self, spec: TeacherSpec, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._model, _ = _load_model(spec, accelerator)
        self._tokenize = _Tokenizer(spec, getattr(self._model.config, "max_position_embeddings", 512), masked=True)
        self.logit_scale = spec.logit_scale
        with _first_input(self._model):
            self.dim = self.encode_texts(PROBE_TEXTS).shape[1]
        if spec.compile:
            raise ValueError("`compile` is for image towers, and this model has none; remove it")
        _hold_in_precision(self, self._model, accelerator)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """B strings -> [B, dim] float32, unit norm."""
        with self._accelerator.forward():
            tokens = self._tokenize(texts, self._accelerator)
            hidden = self._model(**tokens).last_hidden_state.float()
            mask = tokens["attention_mask"].unsqueeze(-1)
            return _unit((hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1))


class _Tokenizer:
    """The model's tokenizer, with special tokens in texts escaped."""

    def __init__(self, spec: TeacherSpec, positions: int, masked: bool) -> None:
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(spec.model, trust_remote_code=False)
        if self._tokenizer.pad_token is None:
            raise ValueError(f"the tokenizer of {spec.model} has no padding token")
        self._escape = special_token_escaper(self._tokenizer.all_special_tokens)
        # tokenizers without a limit report a huge model_max_length
        self._length = min(positions, self._tokenizer.model_max_length)
        self._masked = masked

    def __call__(
        self, texts: Sequence[str], accelerator: Accelerator, full_length: bool = False
    ) -> dict[str, torch.Tensor]:
        tokens = self._tokenizer(
            [self._escape(text) for text in texts],
            padding="max_length" if full_length else "longest",
            truncation=True,
            max_length=self._length,
            return_attention_mask=self._masked,
            return_tensors="pt",
        )
        names = [name for name in tokens if self._masked or name == "input_ids"]
        return {name: accelerator.put(tokens[name]) for name in names}


def image_spec(config: dict[str, Any]) -> ImageSpec:
    """Convert an image processor's config to an ImageSpec. Raises ValueError if that is not possible.

    A margin (DINOv2 resizes to 256 and crops 224) is dropped: the shorter side is resized to the crop.
    """
    crop = config.get("crop_size") if config.get("do_center_crop") else None
    size = config.get("size")
    if isinstance(size, int):
        size = {"shortest_edge": size} if crop else {"height": size, "width": size}
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    frame = crop or size or {}
    if not config.get("do_resize", True) or "height" not in frame or "width" not in frame:
        raise ValueError(f"images have no fixed size (size {size}, crop_size {crop})")
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


def _load_image_spec(spec: TeacherSpec) -> ImageSpec:
    processor = transformers.AutoImageProcessor.from_pretrained(spec.model, trust_remote_code=False)
    return image_spec(processor.to_dict())


def _load_model(spec: TeacherSpec, accelerator: Accelerator) -> tuple[Any, bool]:
    """Load the model -> (model, whether its pooler has weights). Hub downloads use huggingface_hub's file locks."""
    model, report = transformers.AutoModel.from_pretrained(
        spec.model, trust_remote_code=False, output_loading_info=True
    )
    missing = sorted(report["missing_keys"])
    # Checkpoints with other heads often lack the pooler, which is then not used. Other missing weights are an error.
    needed = [key for key in missing if not key.startswith("pooler.")]
    if needed or report["mismatched_keys"]:
        wrong = [*needed, *map(str, report["mismatched_keys"])]
        raise ValueError(f"the weights of {spec.model} do not fit {type(model).__name__}: {', '.join(wrong[:5])}")
    return accelerator.prepare(model.float()), not missing


def _hold_in_precision(teacher: Any, model: Any, accelerator: Accelerator) -> None:
    if accelerator.device.type == "cuda":
        towers.hold_in_precision(model, accelerator, lambda: towers.probe_outputs(teacher, accelerator))


def _make_fast(
    teacher: Any, model: Any, spec: TeacherSpec, accelerator: Accelerator, encode: EncodeImages
) -> EncodeImages:
    """Hold the weights of a teacher in its precision on CUDA, and compile its image tower if the spec asks for it."""
    _hold_in_precision(teacher, model, accelerator)
    if not spec.compile:
        return encode
    towers.compile_blocks(getattr(model, "vision_model", model))
    return towers.padded(encode)


@contextmanager
def _first_input(model: Any) -> Iterator[None]:
    """Name the model in errors of its first forward pass."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be a teacher: {type(error).__name__}: {error}") from error


def _image_dim(encode: Callable[[torch.Tensor], torch.Tensor], spec: ImageSpec | None, accelerator: Accelerator) -> int:
    assert spec is not None
    return encode(torch.zeros(1, 3, spec.height, spec.width, device=accelerator.device)).shape[1]


def _features(output: Any) -> torch.Tensor:
    """Unwrap the embeddings, which transformers 5 returns in a model output."""
    features: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return features


def _unit(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)
