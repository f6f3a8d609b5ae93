"""What a user writes about one teacher or captioner in a config."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ModelSpec(BaseModel):
    """A model by name and weights, or a class of the user's own."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)
    _PUBLISHED: ClassVar[tuple[str, ...]] = ()  # what is said of one of family published, beside its name

    family: Literal["open_clip", "transformers", "published"] = Field(
        "open_clip",
        description="library that `model` belongs to; published: its outputs are read from `reinforcements`",
    )
    model: str | None = Field(
        None,
        description="open_clip: a model name, hf-hub:ORG/REPO or local-dir:PATH; transformers: hub name or folder; "
        "published: of a teacher its name, of a captioner the list in syn.json, such as syn_text",
    )
    pretrained: str | None = Field(
        None, description="open_clip: pretrained tag, or a checkpoint file by path or fsspec URL"
    )
    class_: str | None = Field(None, alias="class", description="a class of your own, package.module:Class")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of your class")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="arithmetic of the forward pass")

    @model_validator(mode="after")
    def _one_source(self) -> ModelSpec:
        if (self.model is None) == (self.class_ is None):
            raise ValueError("give either `model` (with `pretrained` if need be) or `class`, not both")
        if self.class_ is not None:
            module, _, name = self.class_.partition(":")
            if not module or not name:
                raise ValueError(f"`class` must be package.module:Class, got {self.class_!r}")
            if self.pretrained is not None:
                raise ValueError("`pretrained` belongs to `model`; pass weights to your class in `options`")
        elif self.options:
            raise ValueError("`options` are for a `class` of your own")
        if self.family == "published" and (unused := self.model_fields_set - {"family", "model", *self._PUBLISHED}):
            raise ValueError(f"{', '.join(sorted(unused))}: not used with family published; remove it")
        return self


class TeacherSpec(ModelSpec):
    """One entry of ``teachers:``."""

    _PUBLISHED: ClassVar[tuple[str, ...]] = ("columns", "logit_scale", "dtype")

    logit_scale: float | None = Field(
        None, gt=0, description="1/temperature students distil with; default: the model's own"
    )
    dtype: Literal["float16", "float32", "int8"] = Field("float16", description="storage of the embeddings")
    columns: tuple[int, int] | None = Field(
        None, strict=False, description="of family published: where its vectors begin and end among all teachers'"
    )

    @model_validator(mode="after")
    def _of_published(self) -> TeacherSpec:
        if (self.family == "published") != (self.columns is not None):
            raise ValueError("`columns` and `family: published` belong together, as in `columns: [0, 768]`")
        if self.columns is not None:
            if not 0 <= self.columns[0] < self.columns[1]:
                raise ValueError(f"columns: want 0 <= first < end, got {[*self.columns]}")
            if self.logit_scale is None:
                raise ValueError("a teacher of family published needs its `logit_scale`: no model is there to tell it")
        return self


class Clean(BaseModel):
    """What is done to captions before they are stored. White space becomes single spaces and empty ones are dropped."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    first_sentence: bool = Field(False, description="keep the first sentence of each")
    words: int | None = Field(None, ge=1, description="cut behind that many words")
    characters: int | None = Field(None, ge=1, description="cut at the last word that ends within that many characters")
    drop_repetitive: bool = Field(True, description="drop a caption in which some words stand three times in a row")
    drop_duplicates: bool = Field(True, description="drop a caption that an image has already, in any case")


class CaptionerSpec(ModelSpec):
    """One entry of ``captioners:``.

    ``strategy`` says how words are chosen, and which of the fields below it are used. The two that sample are seeded
    per (key, index); the others depend on the image alone.
    """

    _PUBLISHED: ClassVar[tuple[str, ...]] = ("captions",)

    captions: int = Field(
        5, ge=1, le=64, description="captions per image; of beams the best, of greedy, which has but one, 1"
    )
    prompt: str | None = Field(None, min_length=1, description="what a chat model of transformers is asked")
    image_size: int | None = Field(
        None, ge=8, description="side in pixels of the square that a chat model of any resolution sees"
    )
    strategy: Literal["nucleus", "top_k", "greedy", "beams", "diverse_beams"] = Field(
        "nucleus",
        description="nucleus: sample among the likeliest words that make up `top_p` of the probability; top_k: among "
        "the `top_k` likeliest; greedy: always the likeliest; beams: search for the likeliest captions; "
        "diverse_beams: in groups that avoid each other's words",
    )
    temperature: float = Field(1.0, gt=0, description="of nucleus and top_k: above 1 evens the probabilities out")
    top_p: float = Field(0.9, gt=0, le=1, description="of nucleus")
    top_k: int = Field(50, ge=1, description="of top_k")
    beams: int = Field(6, ge=2, le=64, description="of beams and diverse_beams: captions that grow side by side")
    groups: int = Field(3, ge=2, description="of diverse_beams: the beams are divided among so many")
    diversity: float = Field(
        0.5, gt=0, description="of diverse_beams: log-probability lost for each beam of a group before with that word"
    )
    length_penalty: float = Field(
        1.0,
        description="of beams and diverse_beams: a caption's score is its log-probability over its length to this "
        "power; 0 favours short captions",
    )
    repetition_penalty: float = Field(
        1.0, ge=1, description="of all: divides the logits of words that the caption has, if positive, else multiplies"
    )
    min_length: int = Field(5, ge=0, description="the end token is impossible before that many tokens")
    max_length: int = Field(30, ge=2, description="longest caption in tokens, start and end included")
    compile: bool = Field(
        False, description="of CoCa: compile the decoding step, on CUDA as graphs; takes minutes once, for long runs"
    )

    clean: Clean | None = Field(
        None, description="what is done to captions before they are stored; the slots of dropped ones repeat the others"
    )

    @model_validator(mode="after")
    def _lengths(self) -> CaptionerSpec:
        if self.min_length + 2 > self.max_length:
            raise ValueError("max_length must be at least min_length + 2 (start and end count)")
        return self

    @model_validator(mode="after")
    def _of_the_strategy(self) -> CaptionerSpec:
        for field in sorted(self.model_fields_set - set(_STRATEGIES[self.strategy])):
            if users := [name for name, used in _STRATEGIES.items() if field in used]:
                raise ValueError(
                    f"`{field}` is not used by strategy {self.strategy}: remove it, or set `strategy` to "
                    f"{' or '.join(users)}"
                )
        if self.strategy == "greedy" and self.captions > 1:
            raise ValueError("strategy greedy has one caption for an image: set `captions: 1`, or sample")
        if "beams" in _STRATEGIES[self.strategy] and self.captions > self.beams:
            raise ValueError(f"{self.captions} captions of {self.beams} beams: set `beams` to {self.captions} or more")
        if self.strategy == "diverse_beams" and self.beams % self.groups:
            raise ValueError(f"{self.beams} beams cannot be divided among {self.groups} groups of equal size")
        return self

    @property
    def rows_per_image(self) -> int:
        """Captions of an image that grow side by side."""
        return self.beams if "beams" in _STRATEGIES[self.strategy] else self.captions

    def decoding(self) -> dict[str, Any]:
        """All that decides which words are chosen. What was added later shows only where it is used."""
        used = {field: getattr(self, field) for field in ("captions", *_STRATEGIES[self.strategy], *_LENGTHS)}
        strategy = {} if self.strategy == "nucleus" else {"strategy": self.strategy}
        penalty = {} if self.repetition_penalty == 1 else {"repetition_penalty": self.repetition_penalty}
        return {**used, **strategy, **penalty}


#: The fields that each strategy alone uses.
_STRATEGIES: dict[str, tuple[str, ...]] = {
    "nucleus": ("temperature", "top_p"),
    "top_k": ("temperature", "top_k"),
    "greedy": (),
    "beams": ("beams", "length_penalty"),
    "diverse_beams": ("beams", "groups", "diversity", "length_penalty"),
}
_LENGTHS = ("min_length", "max_length")
#: All fields about decoding, which a class of the user's does not use.
DECODING_FIELDS = (
    *("strategy", "temperature", "top_p", "top_k", "beams", "groups", "diversity", "length_penalty"),
    *("repetition_penalty", *_LENGTHS, "compile"),
)
