"""The spatial map of an image tower of open_clip, timm or transformers, at its end or after one of its stages.

A map has no class or register tokens, and is taken before pooling and projection. The tower's final norm is applied as
in dense uses of these models: to the patches, too, where the tower applies it to the pooled token alone (CLIP). Two
towers give it without one: CoCa's, whose norm follows its attention pooler, and those of timm that normalise what they
have pooled (``fc_norm``). Convolutional towers give the outputs of their stages, FastViT (MobileCLIP's MCi) too.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from teachers.fast_paths import towers
from teachers.fast_paths.towers import padded
from teachers.protocols import ImageSpec
from teachers.runtime.accelerator import Accelerator
from teachers.spec import TeacherSpec

Map = Callable[[torch.Tensor], torch.Tensor]


def spatial_map(tower: Any, stage: int = -1, inputs: Callable[[torch.Tensor], Mapping[str, Any]] | None = None) -> Map:
    """The map of a tower as a function, pixels [B, 3, H, W] -> [B, C, rows, columns].

    ``tower`` is an image tower, or a model that has one. ``stage`` is an index into the blocks of a transformer or the
    stages of another tower, from the end if it is negative. ``inputs`` makes the arguments of a model of transformers.
    Raises ValueError for a tower without a map.
    """
    tower = image_tower(tower)
    if hasattr(tower, "forward_intermediates"):
        return lambda pixels: _intermediates(tower, pixels, stage)
    if hasattr(getattr(tower, "config", None), "model_type"):
        if stage != -1:
            raise ValueError(f"{type(tower).__name__} of transformers gives its last map alone, not stage {stage}")
        return _TransformersMap(tower, inputs or (lambda pixels: {"pixel_values": pixels}))
    raise ValueError(
        f"{type(tower).__name__} has no patches that are known here: use a model of open_clip, timm or transformers, "
        "or a class with a method `encode_patches`"
    )


def features_and_map(visual: Any, pixels: torch.Tensor, stage: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """The features [B, D] and the map [B, C, rows, columns] of an open_clip tower or a network of timm, in one pass."""
    network = image_tower(visual)
    if network is not visual:
        last, [grid] = network.forward_intermediates(pixels, indices=[stage], norm=True, output_fmt="NCHW")
        return network.forward_head(last), grid
    found = _open_clip(visual, pixels, stage, intermediates_only=False)
    return found["image_features"], found["image_intermediates"][0]


def image_tower(model: Any) -> Any:
    """The image tower of a model, or the model itself."""
    for name in ("visual", "vision_model", "timm_model"):  # of open_clip, of transformers, of its wrapper of timm
        model = getattr(model, name, model)
    return model if hasattr(model, "forward_intermediates") else getattr(model, "trunk", model)


def resized(model: Any, height: int, width: int) -> Any:
    """A copy of a model's image tower for images of another size in pixels, with interpolated position embeddings.

    Towers that take any size are returned as they are.
    """
    tower = image_tower(model)
    grid = getattr(tower, "grid_size", None)
    trunk = getattr(tower, "trunk", tower)
    if grid is not None and hasattr(tower, "positional_embedding"):  # a transformer of open_clip
        from open_clip.model import resize_pos_embed

        tower = copy.deepcopy(tower)
        tower.image_size = (height, width)
        tower.grid_size = (height // tower.patch_size[0], width // tower.patch_size[1])
        holder = torch.nn.Module()
        holder.visual = tower
        state = {"visual.positional_embedding": tower.positional_embedding.data}
        resize_pos_embed(state, holder)
        tower.positional_embedding = torch.nn.Parameter(state["visual.positional_embedding"], requires_grad=False)
    elif hasattr(trunk, "set_input_size"):
        tower = copy.deepcopy(tower)
        getattr(tower, "trunk", tower).set_input_size((height, width))
    return tower


def _intermediates(tower: Any, pixels: torch.Tensor, stage: int) -> torch.Tensor:
    if "normalize_intermediates" in inspect.signature(tower.forward_intermediates).parameters:
        found = _open_clip(tower, pixels, stage, intermediates_only=True)["image_intermediates"]
    else:
        found = tower.forward_intermediates(
            pixels, indices=[stage], norm=True, stop_early=True, intermediates_only=True, output_fmt="NCHW"
        )
    grid: torch.Tensor = found[0]
    return grid


def _open_clip(visual: Any, pixels: torch.Tensor, stage: int, intermediates_only: bool) -> dict[str, Any]:
    # open_clip's ResNet cuts its stages after the last index where it should not: all are asked for
    resnet = hasattr(visual, "attnpool")
    found: dict[str, Any] = visual.forward_intermediates(
        pixels,
        indices=None if resnet else [stage],
        stop_early=intermediates_only,
        normalize_intermediates=getattr(visual, "attn_pool", None) is None,
        intermediates_only=intermediates_only,
    )
    if not resnet:
        return found
    maps = found["image_intermediates"]
    if not -len(maps) <= stage < len(maps):
        raise ValueError(f"feature index {stage} is out of range (0 to {len(maps) - 1})")
    return {**found, "image_intermediates": [maps[stage]]}


class _TransformersMap:
    """The last hidden states of a model of transformers, without the tokens before the patches, as a map."""

    def __init__(self, tower: Any, inputs: Callable[[torch.Tensor], Mapping[str, Any]]) -> None:
        self._tower, self._inputs = tower, inputs
        self._any_size = "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters
        self._norm = getattr(tower, "post_layernorm", None)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        ranks: list[int] = []
        hook = self._norm and self._norm.register_forward_hook(lambda _, args, __: ranks.append(args[0].ndim))
        options = {"interpolate_pos_encoding": True} if self._any_size else {}
        try:
            hidden = self._tower(**self._inputs(pixels), **options).last_hidden_state
        finally:
            if hook is not None:
                hook.remove()
        if hidden.ndim == 4:
            grid: torch.Tensor = hidden
            return grid
        tower, config = type(self._tower).__name__, self._tower.config
        patch = getattr(config, "patch_size", None)
        if patch is None:
            raise ValueError(f"the config of {tower} states no `patch_size`")
        height, width = (patch, patch) if isinstance(patch, int) else (patch[0], patch[-1])
        rows, columns = pixels.shape[2] // height, pixels.shape[3] // width
        # Before the patches are no tokens, or those that the config and the weights state.
        before = hidden.shape[1] - rows * columns
        distilled = any("distillation_token" in name for name, _ in self._tower.named_parameters())
        stated = getattr(config, "num_summary_tokens", None) or (
            1 + (getattr(config, "num_register_tokens", None) or 0) + distilled
        )
        if before not in (0, stated):
            raise ValueError(
                f"{tower} gives {hidden.shape[1]} tokens, which are no grid of {rows} x {columns} after {stated} others"
            )
        patches = hidden[:, before:]
        if self._norm is not None and ranks == [2]:  # the model has normalised its pooled token alone
            patches = self._norm(patches)
        return patches.transpose(1, 2).unflatten(2, (rows, columns))


Encode = Callable[[torch.Tensor], torch.Tensor]


class PatchEncoder:
    """Encodes images to ``rows`` x ``columns`` vectors of ``dim`` numbers, found by one black image at construction.

    ``image`` is the preprocessing of its images. Raises ValueError for a model that gives no grid.
    """

    def __init__(self, encode: Encode, image: ImageSpec, device: torch.device, name: str) -> None:
        self.image, self._encode, self._name = image, encode, name
        with _errors_of(name, image):
            found = encode(torch.zeros(1, 3, image.height, image.width, device=device))
            if not isinstance(found, torch.Tensor) or found.ndim != 4 or len(found) != 1 or not found.numel():
                shape = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
                raise ValueError(f"[1, rows, columns, dim] is needed, got {shape}")
        self.rows, self.columns, self.dim = found.shape[1:]

    def encode_patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """Float32 [B, 3, H, W] on the device, preprocessed by ``image`` -> float32 [B, rows, columns, dim].

        The vectors have any norm. The first row is the top of the image, the first column its left.
        """
        patches = self._encode(pixels)
        if patches.shape != (shape := (len(pixels), self.rows, self.columns, self.dim)):
            raise ValueError(f"{self._name} gives patches of shape {list(patches.shape)}, not {list(shape)}")
        return patches.float().contiguous()


def patches_of(
    teacher: Any, device: torch.device, stage: int = -1, size: tuple[int, int] | None = None
) -> PatchEncoder:
    """The patch encoder of a loaded teacher, or of any other encoder of images.

    It has a method ``patches(stage, size)``, as the teachers of open_clip and transformers have, or is of a class of
    the user's with ``encode_patches(pixels) -> [B, rows, columns, dim]``. ``stage`` is that of ``spatial_map``,
    ``size`` another (height, width) of the images. Raises ValueError where it has no patches.
    """
    name = type(teacher).__name__
    if getattr(teacher, "image", None) is None:
        raise ValueError(f"{name} has no patches, since it encodes no images")
    if callable(getattr(teacher, "patches", None)):
        found: PatchEncoder = teacher.patches(stage, size)
        return found
    if not callable(getattr(teacher, "encode_patches", None)):
        raise ValueError(f"{name} has no patches: add a method `encode_patches(pixels) -> [B, rows, columns, dim]`")
    if stage != -1:
        raise ValueError(f"{name} gives its own patches, of no stages: remove stage {stage}")
    image = teacher.image if size is None else replace(teacher.image, size=size)
    return PatchEncoder(teacher.encode_patches, image, device, name)


def encoder_of_model(
    model: Any,
    image: ImageSpec,
    accelerator: Accelerator,
    stage: int = -1,
    size: tuple[int, int] | None = None,
    inputs: Callable[[torch.Tensor], Any] | None = None,
) -> PatchEncoder:
    """The patch encoder of a model on its device in eval mode. ``inputs`` is that of ``spatial_map``.

    For another ``size`` of images the position embeddings of a transformer are interpolated, in a copy of the tower.
    """
    tower = image_tower(model)
    name = f"{type(model).__name__}, stage {stage}" if stage != -1 else type(model).__name__
    if size is not None and size != (image.height, image.width):
        image = replace(image, size=size)
        with _errors_of(name, image):
            tower = resized(tower, *size)
    to_map = spatial_map(tower, stage, inputs)

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        with accelerator.forward():
            return to_map(accelerator.layout(pixels)).permute(0, 2, 3, 1).float()

    compiled = any(module._compiled_call_impl is not None for module in tower.modules())
    return PatchEncoder(padded(encode) if compiled else encode, image, accelerator.device, name)


@contextmanager
def _errors_of(name: str, image: ImageSpec) -> Iterator[None]:
    """Errors of any library as a ValueError that names the model and the size of its images."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"{name} gives no patches for images of {image.height} x {image.width} pixels: {reason}"
        ) from error


class ImageEncoder:
    """Encodes images by ``encode``, [B, 3, H, W] -> [B, dim], of a model that is on its device in eval mode.

    ``inputs`` is that of ``teachers.image_encoder.spatial_map``.
    """

    def __init__(
        self,
        model: Any,
        image: ImageSpec,
        accelerator: Accelerator,
        encode: Callable[[torch.Tensor], torch.Tensor],
        inputs: Callable[[torch.Tensor], Any] | None = None,
    ) -> None:
        self._model, self._accelerator = model, accelerator
        self._encode_images, self._tower_inputs = encode, inputs
        self.image: ImageSpec | None = image

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] float32 -> [B, dim] float32, unit norm."""
        with self._accelerator.forward():
            return unit(self._encode_images(self._accelerator.layout(pixels)))

    def patches(self, stage: int = -1, size: tuple[int, int] | None = None) -> PatchEncoder:
        """The encoder of the tower's patches; see ``teachers.image_encoder``."""
        assert self.image is not None
        return encoder_of_model(self._model, self.image, self._accelerator, stage, size, self._tower_inputs)

    def _embed_black(self) -> torch.Tensor:
        """The embedding [1, dim] of a black image."""
        assert self.image is not None
        shape = 1, 3, self.image.height, self.image.width
        return self.encode_images(torch.zeros(shape, device=self._accelerator.device))

    def _make_fast(self, tower: torch.nn.Module, spec: TeacherSpec) -> None:
        """Take the fast paths that ``spec`` asks for, or that work; ``tower`` is the model's part for images."""
        towers.freeze(self, self._model, self._accelerator, spec)
        if spec.precision == "fp8":
            towers.use_fp8(self, tower, self._accelerator)
        self._encode_images = towers.compile_images(self, tower, self._encode_images, spec.compile, self._accelerator)


def unit(features: torch.Tensor) -> torch.Tensor:
    """Features [B, dim] of any norm -> float32 of unit norm."""
    return torch.nn.functional.normalize(features.float(), dim=-1)
