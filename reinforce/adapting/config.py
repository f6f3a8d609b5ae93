"""The config of ``reinforce adapt``: a released model, a user's images, and the configs of the steps between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, Field, field_validator, model_validator

from reinforce.config import Config
from reinforce.evaluation.config import Evaluation
from reinforce.settings import Section, flatten
from reinforce.student.config import StudentConfig

#: Names in the datasets and configs that a step reads of another.
RELEASED, DOMAIN, TRAIN, HELD_OUT = "released", "domain", "train", "held-out"
FEWEST_IMAGES = 20
#: Keys of the steps' configs that `adapt` sets by its own keys, which are named after them.
_OWN = {
    "run": {"source": "source", "output": "output", "teachers": "teachers"},
    "student": {
        "output": "output", "student.model": "released", "student.pretrained": "released",
        "student.image_size": "released", "data.datasets": "source",
    },
}  # fmt: skip


class Released(Section):
    """The model that is adapted, with its weights."""

    model: str = Field(min_length=1, description="an open_clip name such as MobileCLIP2-S0, hf-hub:, or local-dir:PATH")
    pretrained: str | None = Field(
        None, description="tag or checkpoint of its weights; none for hf-hub: and local-dir:"
    )


class AdaptConfig(Section):
    """One adaptation of a released student to images of a domain."""

    configs: ClassVar[Mapping[str, type[BaseModel]]] = {"run": Config, "student": StudentConfig}

    source: str = Field(min_length=1, description="images with captions, or in folders of classes; as of `init`")
    output: str = Field(min_length=1, description="folder for the dataset, the training run, the model and the page")
    released: Released
    seed: int = Field(0, ge=0, description="seed of the held-out part, of augmentations and of the training")
    held_out: float = Field(0.2, gt=0, lt=1, description="share of the images that are evaluated and not trained on")
    copies: float = Field(
        0.95, gt=0, le=1, description="cosine of the released model's vectors from which two images are near copies"
    )
    allow: float = Field(0.5, ge=0, description="points (%) that the mean of the general metrics may lose")
    alphas: list[float] | None = Field(
        None, min_length=1, description="shares of the trained weights to evaluate; default: 0, 0.1, ... 1"
    )
    teachers: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="teachers besides the released model, as in a run's config"
    )
    general: Evaluation = Field(Evaluation(), description="sets on which the model must stay good")
    run: dict[str, Any] = Field(
        default_factory=dict, description="keys of the run's config that replace those of `adapt`, such as workers"
    )
    student: dict[str, Any] = Field(
        default_factory=dict, description="keys of the training's config that replace those of `adapt`, such as train"
    )

    @field_validator("source", "output")
    @classmethod
    def _without_slash(cls, url: str) -> str:
        return url.rstrip("/") or url

    @model_validator(mode="after")
    def _check_names(self) -> AdaptConfig:
        for section, changed in (("run", self.run), ("student", self.student)):
            for key, _ in flatten(changed):
                for own, named in _OWN[section].items():
                    if f"{key}.".startswith(f"{own}."):
                        raise ValueError(f"{section}.{key} follows from `{named}` of the adaptation; remove it")
        if RELEASED in self.teachers:
            raise ValueError(f"teachers: {RELEASED!r} is the name of the model that is adapted; choose another")
        for sets in (self.general.zero_shot, self.general.retrieval):
            if DOMAIN in sets:
                raise ValueError(f"general: {DOMAIN!r} is the name of the held-out images; choose another")
        if any(not 0 <= alpha <= 1 for alpha in self.alphas or ()):
            raise ValueError("alphas: a share is between 0 and 1")
        return self
