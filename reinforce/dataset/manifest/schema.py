"""Validation of dataset.json, which may be untrusted. Keys of other versions are ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from reinforce.config_schema import LAYER_NAME
from reinforce.dataset.codecs.registry import find_codec
from reinforce.dataset.kinds.registry import KINDS
from reinforce.dataset.layers import MODEL_SECTIONS, parts_of
from reinforce.errors import UserError
from reinforce.terminal import escape

_Text = Annotated[str, Field(max_length=4096)]
_Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_MAX_LAYERS = 4096
_SHOWN_ERRORS = 3
_SECTIONS = ("layers", *MODEL_SECTIONS)


def _known_kind(name: str) -> str:
    if name not in KINDS:
        *names, last = (repr(kind) for kind in KINDS)
        raise PydanticCustomError("literal_error", f"Input should be {', '.join(names)} or {last}")
    return name


def _known_codec(name: str) -> str:
    try:
        find_codec(name)
    except ValueError as error:
        raise PydanticCustomError("literal_error", f"{str(error)[:200]}") from None
    return name


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


class _Codebook(_Part):
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    sample: int = Field(ge=1)


class _LayerEntry(_Part):
    kind: Annotated[str, AfterValidator(_known_kind)]
    fingerprint: _Text
    count: Annotated[int, Field(ge=0, le=2**16)] | None = None
    dim: Annotated[int, Field(ge=1, le=2**20)] | None = None
    dtype: Annotated[str, AfterValidator(_known_codec)] | None = None
    codebook: _Codebook | None = None
    grid: list[int] | None = None
    picked: Annotated[int, Field(ge=1)] | None = None
    texts: _Text | None = None
    teacher: _Text | None = None
    captioner: _Text | None = None
    names: list[_Text] | None = None
    needs: list[_Text] | None = None
    score: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_kind(self) -> _LayerEntry:
        KINDS[self.kind].check_entry(self.model_dump(exclude_unset=True))
        return self


class _Tuned(_Part):
    config: _Scale | None
    before: _Scale | None
    before_from: _Text


class _TeacherEntry(_Part):
    logit_scale: _Scale | None
    logit_scale_from: _Text
    dim: Annotated[int, Field(ge=1, le=2**20)] | None = None
    logit_scale_tuned: _Tuned | None = None


class _Augmentations(_Part):
    size: int = Field(ge=1, le=4096)


class _Labels(_Part):
    version: int
    images: Literal["embed", "reference"]
    identities: list[_Text] = Field(max_length=16)
    licence: _Text = "unknown"
    hidden: list[_Text] = Field(default_factory=list, max_length=_MAX_LAYERS)


class _Manifest(_Part):
    images: Literal["embed", "reference", "none"]
    schema_version: int = 0
    seed: int = 0
    augmentations: _Augmentations
    moved: dict[_Text, _Text] = Field(default_factory=dict)
    layers: dict[str, _LayerEntry] = Field(max_length=_MAX_LAYERS)
    teachers: dict[str, _TeacherEntry]
    captioners: dict[str, dict[str, Any]]
    labels: _Labels | None = None


class _Stage(_Part):
    inputs: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    per_second: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    mfu: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class _Device(_Part):
    name: _Text = ""
    memory_peak: int = Field(0, ge=0)
    memory_total: int = Field(0, ge=0)


class _FastPath(_Part):
    model: _Text
    path: _Text
    asked: bool = False
    used: int = Field(0, ge=0)
    plain: int = Field(0, ge=0)
    reason: _Text | None = None


class RunRecord(_Part):
    """What ``reinforce status`` and ``inspect`` show of a run's summary.json."""

    run: _Text | None = None
    shards: int = 0
    samples: int = 0
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    message: _Text | None = None
    cleaned: dict[str, dict[str, int]] = Field(default_factory=dict)
    source_counts: dict[str, int] = Field(default_factory=dict)
    not_in_source: dict[str, int | _Text | None] = Field(default_factory=dict)
    busy_share: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    stages: dict[_Text, _Stage] = Field(default_factory=dict)
    device: _Device = _Device()
    fast_paths: list[_FastPath] = Field(default_factory=list)

    @property
    def rate(self) -> float:
        """Samples a second."""
        return self.samples / self.seconds if self.seconds else 0.0


def check_manifest(manifest: Mapping[str, Any], where: str) -> None:
    """Raise UserError if the content of a dataset.json is not what readers rely on."""
    _check_names(manifest, where)
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        raise UserError(f"{where}: dataset.json is not valid: {_describe(error)}. Restore it.") from None


def check_run(summary: Mapping[str, Any], where: str) -> RunRecord:
    """Check a run's summary.json. Raises UserError."""
    try:
        return RunRecord.model_validate(summary)
    except ValidationError as error:
        raise UserError(f"{where} is not valid: {_describe(error)}. Delete it.") from None


def _check_names(manifest: Mapping[str, Any], where: str) -> None:
    """Raise UserError if a name that becomes part of a path is not valid for a layer."""
    sections = [section for key in _SECTIONS if isinstance(section := manifest.get(key), dict)]
    if len(sections) < len(_SECTIONS):
        raise UserError(f"{where}: dataset.json is not that of a reinforced dataset. Restore it.")
    layers, *models = sections
    parts = [part for layer in layers for part in parts_of(layer)]
    for name in (*parts, *(name for section in models for name in section)):
        if not LAYER_NAME.fullmatch(name):
            raise UserError(
                f"{where}: dataset.json has {escape(name[:100])!r}, which is not a valid layer name. Restore it."
            )


def _describe(error: ValidationError) -> str:
    found = error.errors(include_input=False, include_url=False)
    lines = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in found[:_SHOWN_ERRORS]]
    return escape("; ".join(line[:200] for line in lines))
