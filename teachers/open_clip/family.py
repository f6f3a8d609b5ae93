"""Models of open_clip by name and weights, as teachers, and the keys of all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from teachers import weights
from teachers.decoding.postprocess import cleaning_identity
from teachers.open_clip import catalog
from teachers.spec import CHAT_FIELDS, CaptionerSpec, ModelInfo, ModelSpec, TeacherSpec
from teachers.tokens import check_tokenizer_files

_Mean = Annotated[float, Field(allow_inf_nan=False)]
_Std = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Preprocess(BaseModel):
    """How RGB images become the input of an open_clip model. Keys that are not set are as the weights state."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    mean: Annotated[list[_Mean], Field(min_length=3, max_length=3)] | None = Field(
        None, description="mean of each channel, of values from 0 to 1"
    )
    std: Annotated[list[_Std], Field(min_length=3, max_length=3)] | None = Field(
        None, description="standard deviation of each channel, of values from 0 to 1"
    )
    interpolation: Literal["bicubic", "bilinear"] | None = Field(None, description="interpolation of the resize")
    resize_mode: Literal["shortest", "squash"] | None = Field(
        None, description="shortest: resize the shorter side, then crop the center; squash: resize both sides"
    )


#: Description of `preprocess` in every config that has it.
PREPROCESS = (
    "how images are normalised and resized; default: as the pretrained tag, the open_clip_config.json in the folder of "
    "the weights, or the hub states. Needed for a checkpoint file whose model has tags with other values than open_clip"
)


class OpenClipOptions(ModelSpec):
    preprocess: Preprocess | None = Field(None, description=f"open_clip: {PREPROCESS}")

    def hosts(self) -> Iterator[str]:
        pretrained = catalog.weights_name(self.name, self.pretrained)
        if self.name.startswith(catalog.HUB_PREFIX):
            yield f"{weights.HUB} ({self.name.removeprefix(catalog.HUB_PREFIX)})"
        elif not self.name.startswith(catalog.FOLDER_PREFIX) and pretrained and not Path(pretrained).suffix:
            yield f"{weights.HUB} or the host that open_clip names ({self.name}, {pretrained})"


def stated_preprocess(spec: BaseModel) -> dict[str, Any]:
    """The keys of ``preprocess`` that a config of a model sets, if it has such keys."""
    stated = getattr(spec, "preprocess", None)
    return stated.model_dump(exclude_none=True) if isinstance(stated, Preprocess) else {}


#: Tokenizer files of a local folder.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)


class OpenClipTeacherSpec(OpenClipOptions, TeacherSpec):
    loader: ClassVar[str] = "teachers.open_clip.teacher:OpenClipTeacher"

    def describe(self) -> ModelInfo:
        identity = model_identity(self)
        config = catalog.model_config(self.name)
        return ModelInfo(config["embed_dim"] if config else None, images=True, texts=True, identity=identity)


def model_identity(spec: ModelSpec) -> dict[str, Any]:
    """What determines the outputs of a model. Raises ValueError or FileNotFoundError for one that cannot be loaded."""
    model = spec.name
    pretrained = catalog.weights_name(model, spec.pretrained)
    catalog.check_model(model, pretrained)
    identity: dict[str, Any] = {"family": "open_clip", "precision": spec.resolved_precision}
    if model.startswith(catalog.FOLDER_PREFIX):
        # Identified by its files: a folder that was moved is the same model.
        folder = catalog.local_folder(model)
        config = catalog.model_config(model)
        if config is not None and config["text_cfg"].get("hf_tokenizer_name"):
            check_tokenizer_files(folder)
        checkpoint = catalog.folder_weights(model)
        known = [*_TOKENIZER_FILES]
        if config is not None and catalog.text_folder(config) == folder.absolute():
            known.append(catalog.TEXT_CONFIG)
        others = [path for path in folder.glob("*.json") if path.name in known or "open_clip" in path.name]
        identity["files"] = {path.name: weights.identity(path) for path in (checkpoint, *sorted(others))}
    elif model.startswith(catalog.HUB_PREFIX):
        identity["model"] = model
    else:
        identity["model"] = catalog.builtin_name(model)
        assert pretrained is not None
        if catalog.is_checkpoint_file(pretrained):
            identity["weights"] = weights.identity(pretrained)
        else:
            identity["pretrained"] = pretrained.lower().replace("-", "_")  # as open_clip spells it
    if changed := catalog.changed_preprocess(model, pretrained, stated_preprocess(spec)):
        identity["preprocess"] = changed
    return identity


class CocaSpec(OpenClipOptions, CaptionerSpec):
    """CoCa models of open_clip, as captioners."""

    loader: ClassVar[str] = "teachers.coca.captioner:CocaCaptioner"

    def describe(self) -> ModelInfo:
        if given := [field for field in CHAT_FIELDS if getattr(self, field) is not None]:
            raise ValueError(f"{', '.join(given)}: used only by chat models of `family: transformers`; remove it")
        identity = model_identity(self)
        catalog.check_coca(self.name)
        identity = {**identity, **self.decoding(), **cleaning_identity(self.clean)}
        return ModelInfo(dim=None, images=True, texts=False, identity=identity)
