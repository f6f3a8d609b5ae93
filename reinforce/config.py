"""The config of a run: what a user writes, typed and checked before anything starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from reinforce import settings
from reinforce.settings import Section
from teachers.spec import CaptionerSpec, TeacherSpec

#: Names of teachers and captioners, which become folders.
LAYER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def _layer_name(name: str) -> str:
    if not LAYER_NAME.fullmatch(name) or name in ("caption", "images"):
        raise ValueError(
            f"{name!r} cannot name a layer: use letters, digits, '.', '_' and '-'; 'caption' and 'images' are taken"
        )
    return name


LayerName = Annotated[str, AfterValidator(_layer_name)]


class Limits(Section):
    """Bounds on what a sample may be; above them it, or what is left out of it, is in quarantine (captions are cut)."""

    image_bytes: int = Field(64 * 2**20, ge=1, description="encoded bytes of an image")
    pixels: int = Field(89_478_485, ge=1, description="width x height, by the header, before decoding")
    aspect: float = Field(50.0, ge=1, description="longer side / shorter side")
    scans: int = Field(500, ge=1, description="scans of a progressive JPEG: each costs time, and ten are usual")
    caption_chars: int = Field(2_000, ge=1, description="a longer caption is cut here")
    sidecar_bytes: int = Field(2**20, ge=1, description="a larger caption or json member is left out")
    members: int = Field(64, ge=1, description="members of one sample; more are left out")
    key_chars: int = Field(1_000, ge=1, description="characters of a key")
    shard_samples: int = Field(1_000_000, ge=1, description="samples of a shard; what follows is not read")


class Input(Section):
    """How members of a shard become samples."""

    captions: list[str] = Field(
        default=["txt", "json:caption"],
        description="where the true caption stands, first hit wins: a member's extension, or json:FIELD",
    )
    metadata: Literal["all", "none"] | list[str] = Field(
        "all", description="what is kept of the json sidecar: all of it, nothing, or these fields"
    )
    limits: Limits = Limits()


class RandAugment(Section):
    """RandAugment as in torchvision; the DataCompDR policy by default."""

    ops: int = Field(2, ge=0)
    magnitude: int = Field(9, ge=0, lt=31)
    probability: float = Field(1.0, ge=0, le=1, description="of applying it at all")


class Augmentations(Section):
    """The policy that augmentation records are sampled from."""

    count: int = Field(2, ge=1, le=1000, description="records per image")
    size: int = Field(224, ge=8, le=4096, description="side in pixels that crops are resized to")
    scale: tuple[float, float] = Field((0.08, 1.0), strict=False, description="area of the crop / area of the image")
    ratio: tuple[float, float] = Field((3 / 4, 4 / 3), strict=False, description="width / height of the crop")
    rand_augment: RandAugment = RandAugment()

    @model_validator(mode="after")
    def _ordered(self) -> Augmentations:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high:
                raise ValueError(f"{name}: want 0 < low <= high, got {[low, high]}")
        if self.scale[1] > 1:
            raise ValueError("scale: a crop cannot be larger than the image")
        return self


class Workers(Section):
    """The pool of worker actors; it grows and shrinks with the cluster between ``min`` and ``max``."""

    min: int = Field(1, ge=1, description="the run gives up if fewer have started after `start_timeout`")
    max: int | None = Field(
        None,
        ge=1,
        description="default: what the cluster can place; a number is asked for, so that autoscalers add nodes",
    )
    gpus: float = Field(0.0, ge=0, description="accelerators per worker")
    cpus: int = Field(1, ge=1, description="cores per worker: its decoding threads")
    batch: int = Field(256, ge=1, description="images in one forward pass")
    start_timeout: float = Field(600.0, gt=0, description="seconds to wait for `min` workers")

    @model_validator(mode="after")
    def _ordered(self) -> Workers:
        if self.max is not None and self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max})")
        if self.gpus > 1:
            raise ValueError("a worker drives one accelerator: gpus must be at most 1")
        return self


class Failures(Section):
    """When to try again, when to give up on a shard, and when the run has failed."""

    attempts: int = Field(3, ge=1, description="attempts at a shard that raises before it is quarantined")
    solo_attempts: int = Field(
        2, ge=1, description="times a shard may kill or hang its worker alone before it is quarantined"
    )
    sample_seconds: float = Field(
        300.0, gt=0, description="a worker that decodes and augments one image for longer hangs, and is ended"
    )
    stall_seconds: float = Field(
        3600.0, gt=0, description="a worker that gets on with nothing for longer hangs; a slow model's batch must fit"
    )
    allowed_share: float = Field(
        0.01, ge=0, le=1, description="share of shards in quarantine above which a run fails (from 11 on it stops)"
    )


class Config(Section):
    """A run: source shards in, layers out."""

    source: str | list[str] = Field(
        description="WebDataset shards by fsspec URL: braces, globs, a .txt file of URLs, or a list of these"
    )
    output: str = Field(min_length=1, description="folder or fsspec URL of the reinforced dataset")
    reinforcements: str | list[str] | None = Field(
        None,
        description="shards that others have published for those of `source` (DataCompDR, DFNDR), named like them or "
        "in their order, or `source` again: augmentations, and all of `family: published`, are read from them",
    )
    seed: int = 0
    images: Literal["embed", "reference"] = Field(
        "embed", description="keep the encoded images, or (url, offset, length) into uncompressed tars"
    )
    input: Input = Input()
    augmentations: Augmentations = Augmentations()
    captioners: dict[LayerName, CaptionerSpec] = Field(default_factory=dict)
    teachers: dict[LayerName, TeacherSpec] = Field(default_factory=dict)
    workers: Workers = Workers()
    failures: Failures = Failures()

    @property
    def embeds_images(self) -> bool:
        """Whether the samples layer stores the encoded images, instead of references into the source tars."""
        return self.images == "embed"

    @model_validator(mode="after")
    def _published(self) -> Config:
        models = (*self.teachers.items(), *self.captioners.items())
        published = [name for name, spec in models if spec.family == "published"]
        if published and self.reinforcements is None:
            raise ValueError(
                f"{', '.join(published)}: family published is read from `reinforcements`, which are not set"
            )
        drawn = self.augmentations.model_fields_set - {"count", "size"}
        if self.reinforcements is not None and drawn:
            raise ValueError(
                f"augmentations.{sorted(drawn)[0]}: augmentations are read from `reinforcements`, not drawn; remove "
                "it, and set `count` and `size` as they were published"
            )
        return self


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML config and apply ``key.sub=value`` overrides (values are YAML). Raises UserError."""
    return settings.load(Config, path, overrides)


def parse_config(data: dict[str, Any], where: str = "config") -> Config:
    """Check a mapping against the schema. Raises UserError with one line for each fault."""
    return settings.parse(Config, data, where)
