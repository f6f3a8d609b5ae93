"""How a source is read: its formats by name, and the config of what becomes a sample within which limits.

The registry of formats: each is the object ``FORMAT`` of a module, a ``reinforce.source.formats.base.SourceFormat``.
Where a folder has files of several formats, the first of them is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, model_validator

from reinforce.errors import UserError
from reinforce.settings import LAYER_NAME, InSchema, OneOrMore, Section

MODULES = {
    "tar": "reinforce.source.formats.tar",
    "parquet": "reinforce.source.formats.parquet",
    "jsonl": "reinforce.source.formats.jsonl",
    "csv": "reinforce.source.formats.csv",
    "coco": "reinforce.source.formats.coco",
    "folder": "reinforce.source.formats.folder",
    "dataset": "reinforce.source.formats.dataset",
}
#: What a source is read as if nothing of it is recognised, which reports what its files are instead.
DEFAULT = "tar"
#: ``captions`` of a source of images alone.
IMAGES_ALONE = "none"

if TYPE_CHECKING:
    Format = str
else:
    Format = Literal[tuple(MODULES)]  # the name of a registered format


class Limits(Section):
    """Limits on samples. Samples, or parts of samples, above a limit are quarantined; captions are cut.

    Attributes:
        image_bytes: bytes of an encoded image.
        pixels: width x height of an image, checked against its header before decoding.
        aspect: aspect ratio of an image: longer side / shorter side.
        scans: scans of a progressive JPEG; ten are usual, and each takes time to decode.
        caption_chars: characters of a caption; longer captions are cut.
        sidecar_bytes: bytes of a caption or json member; larger members are not read.
        members: members of a sample; further members are not read.
        key_chars: characters of a key.
        shard_samples: samples of a shard; the rest of the shard is not read.
    """

    image_bytes: int = Field(64 * 2**20, ge=1)
    pixels: int = Field(89_478_485, ge=1)
    aspect: float = Field(50.0, ge=1)
    scans: int = Field(500, ge=1)
    caption_chars: int = Field(2_000, ge=1)
    sidecar_bytes: int = Field(2**20, ge=1)
    members: int = Field(64, ge=1)
    key_chars: int = Field(1_000, ge=1)
    shard_samples: int = Field(1_000_000, ge=1)


#: The limits that a config names. The largest image of ``wide`` has half a gigabyte of pixels.
LIMITS = {
    "standard": Limits(),
    "wide": Limits(
        image_bytes=256 * 2**20,
        pixels=178_956_970,
        aspect=1_000.0,
        caption_chars=20_000,
        sidecar_bytes=64 * 2**20,
        members=1_024,
    ),
}


def _limits_by_name(value: object) -> object:
    if isinstance(value, Limits):
        return value
    if not isinstance(value, str) or value not in LIMITS:
        raise ValueError(f"must be {' or '.join(LIMITS)}, got {value!r}")
    return LIMITS[value]


def _name_of_limits(limits: Limits) -> Any:
    return next((name for name, known in LIMITS.items() if known == limits), limits.model_dump())


#: The limits of a section of a config, by their name.
NamedLimits = Annotated[
    Limits,
    BeforeValidator(_limits_by_name),
    PlainSerializer(_name_of_limits),
    Field(description="bounds on a sample: standard, the default, or wide, for larger images and longer captions"),
    InSchema(lambda _: {"enum": [*LIMITS], "type": "string"}),
]


def _check_template(text: str) -> str:
    if "{}" not in text:
        raise ValueError(f"{text!r} has no {{}}: put it where the name of the class belongs")
    return text


Template = Annotated[str, AfterValidator(_check_template)]


def _check_captions(value: object) -> object:
    if value != IMAGES_ALONE and not isinstance(value, (list, tuple)):
        raise ValueError(f"must be a list such as [txt, 'json:caption'], or none for images alone, got {value!r}")
    return value


class Input(Section):
    """How the members of a shard, or the rows of a table, become samples."""

    format: Format | None = Field(
        None, description="what the files of `source` are; default: recognised by their names, else by the first file"
    )
    image: str | None = Field(
        None, description="column of a table with images, their paths or URLs; default: `image`, `jpg` and the like"
    )
    key: str | None = Field(
        None, description="column of a table with keys; default: `key`, `__key__` or `uid`, else shard and row number"
    )
    captions: Annotated[list[str] | Literal["none"], BeforeValidator(_check_captions)] = Field(
        default=["txt", "json:caption"],
        description="where the true caption is: a member's extension or json:FIELD, in tables COLUMN or json:COLUMN; "
        "the first with text is used; `class`: of a folder of images, the name of the folder in it; none: images alone",
    )
    templates: Annotated[list[Template], Field(min_length=1)] | None = Field(
        None,
        description="texts that are made of each caption, which replaces {}, such as 'a photo of a {}.'; for names of "
        "classes; with `captions_per_sample` that many, else the first",
    )
    captions_per_sample: int | None = Field(
        None, ge=1, le=64, description="most true captions of a sample to keep and embed; default: only the first"
    )
    metadata: Literal["all", "none"] | list[str] = Field(
        "all", description="what to keep of the json sidecar, or of the columns: all, none, or a list of names"
    )
    rows_per_shard: int | None = Field(
        None,
        ge=1,
        description="rows of a shard of Parquet, jsonl and csv: files are divided into shards, Parquet at its row "
        "groups; default: a file is a shard",
    )
    images_from: OneOrMore | None = Field(
        None,
        description="folders that a source may name images in: one URL or a list; for tables with places outside their "
        "folder and at private addresses, and for datasets whose images are stored by reference; file names that are "
        "not in the folder of a table are looked for there",
    )
    view: Annotated[str, Field(pattern=rf"^{LAYER_NAME.pattern}(@[0-9a-f]+)?$")] | None = Field(
        None,
        description="view of the dataset in `source` (see `reinforce select`) whose samples are read, or "
        "NAME@FINGERPRINT for that state of it; default: all samples",
    )
    limits: NamedLimits = LIMITS["standard"]
    reduce_to: int | None = Field(
        None,
        ge=8,
        le=65_535,
        description="decode JPEGs at the smallest of 1/2, 1/4, 1/8 size with sides at least this; default: full size",
    )

    @property
    def caption_fields(self) -> list[str]:
        """Where captions are looked for; nowhere for images alone."""
        return [] if self.captions == IMAGES_ALONE else [*self.captions]

    def require_captions(self, what: str) -> None:
        """Raise UserError if this is a source of images alone, whose captions ``what`` needs."""
        if self.captions == IMAGES_ALONE:
            raise UserError(
                f"{what}: it needs captions of the source, and input.captions is none. Remove it, or set "
                "input.captions to where captions are."
            )

    @model_validator(mode="after")
    def _check_images_alone(self) -> Input:
        for key in ("templates", "captions_per_sample"):
            if self.captions == IMAGES_ALONE and getattr(self, key) is not None:
                raise ValueError(
                    f"`{key}` is for captions, and with `captions: none` there are none; remove one of them"
                )
        return self
