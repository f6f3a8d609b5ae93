"""What a config contains for one teacher or captioner of any family, and what its family must offer.

A family derives from ``TeacherSpec``, ``CaptionerSpec`` or both, in ``teachers/<family>/family.py``: it adds its own
keys and implements ``describe``, ``load`` and ``hosts``. ``teachers.registry.FAMILIES`` lists the families.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    model_validator,
)

from teachers.protocols import Precision, Teacher

if TYPE_CHECKING:
    from typing import Self

_PICKED = 16  # patches of an image
_Side = Annotated[int, Field(ge=1, le=1024)]


class Patches(BaseModel):
    """Patch features of a teacher that are stored for each augmented image."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    grid: Annotated[
        _Side | tuple[_Side, _Side], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
    ] = Field(description="patches on a side, or [rows, columns], as the model has them")
    codec: str = Field("float16", description="how patch vectors are stored: float16, pca128, pq96, rq32 and others")
    sample: int = Field(
        32_768, ge=1, description="patch vectors of the first shards to which statistics and codebooks are fitted"
    )
    _picked: int | None = PrivateAttr(None)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.grid if isinstance(self.grid, tuple) else (self.grid, self.grid)

    @property
    def picked(self) -> int | None:
        """Random patches of each image that a run stores as the model gives them, to fit codebooks to; None: all are
        stored by the codec."""
        return self._picked

    @property
    def fewer(self) -> int:
        """``picked`` patches of a run that stores some."""
        return min(_PICKED, math.prod(self.shape))

    def picking(self) -> Patches:
        """A copy with ``picked`` patches."""
        copy = self.model_copy()
        copy._picked = self.fewer
        return copy


_Lengths = TypeVar("_Lengths", bound=Any)  # a model with min_length and max_length


@dataclass(frozen=True)
class ModelInfo:
    """Description of a model that is not loaded.

    ``dim`` is the length of its embeddings, None where it is known only after loading and for captioners. ``images``
    and ``texts`` say which inputs it takes. ``identity`` is a JSON object that the layer fingerprint covers: models
    with equal identities give equal outputs on the same software. ``code`` is the hash of the file that defines a
    custom class, None for other models; no fingerprint covers it. ``codebooks`` are digests of the codebooks of its
    layers, by the names of these.
    """

    dim: int | None
    images: bool
    texts: bool
    identity: dict[str, Any]
    code: str | None = None
    codebooks: Mapping[str, str] = dataclasses.field(default_factory=dict)


class ModelSpec(BaseModel):
    """A model by name and weights, or a custom class."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)

    #: Section of a config with such models, and how messages name the model ``{}``.
    section: ClassVar[str]
    label: ClassVar[str]
    #: Methods of which a class of the user's has one if it is such a model.
    methods: ClassVar[tuple[str, ...]]
    #: Whether a run computes the model in ``precision``, and so resolves ``auto``.
    uses_precision: ClassVar[bool] = True
    #: Whether the outputs are read from the config's ``reinforcements`` instead of computed.
    published: ClassVar[bool] = False
    #: Whether the family uses ``options``.
    takes_options: ClassVar[bool] = False
    #: What makes the model of a spec and an Accelerator, ``module:Callable``; imported when one is loaded, with torch.
    loader: ClassVar[str]
    #: Keys of fast paths, which False turns off.
    fast_paths: ClassVar[tuple[str, ...]] = ()

    family: str = Field(
        "open_clip",
        description="library that `model` belongs to; published: read the outputs from `reinforcements`; openai: "
        "captions by a server at `url`",
    )
    model: str | None = Field(
        None,
        description="open_clip and timm: a model name, hf-hub:ORG/REPO or local-dir:PATH; transformers: hub name or "
        "folder; published: a teacher's name, or for a captioner the list in syn.json, such as syn_text; openai: the "
        "name that the server knows",
    )
    pretrained: str | None = Field(
        None,
        description="open_clip: pretrained tag, or a checkpoint file by path or fsspec URI; timm: such a file, instead "
        "of the weights that timm names",
    )
    class_: str | None = Field(
        None, alias="class", description="a custom class, package.module:Class; see teachers/protocols.py"
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="keyword arguments of the custom class; timm: those of timm.create_model, such as img_size; "
        "openai: further fields of each request",
    )
    precision: Literal["auto"] | Precision = Field(
        "auto",
        description="precision of the forward pass; auto: as dataset.json records, else bf16 where workers use GPUs, "
        "fp32 where they do not. fp32 is IEEE; tf32 rounds the inputs of products on CUDA; fp8, of teachers: linear "
        "layers of the image tower in e4m3, the rest in bf16",
    )

    @model_validator(mode="after")
    def _check_source(self) -> ModelSpec:
        if (self.model is None) == (self.class_ is None):
            raise ValueError("set either `model` (with `pretrained` if needed) or `class`, not both")
        if self.options and not self.takes_options:
            raise ValueError("`options` are used only with `class`")
        return self

    @property
    def resolved_precision(self) -> Precision:
        """``precision``, or fp32 where it is ``auto``, which a run resolves before anything else."""
        return "fp32" if self.precision == "auto" else self.precision

    @property
    def name(self) -> str:
        """``model``, in families that need it."""
        assert self.model is not None
        return self.model

    @property
    def imports(self) -> str | None:
        """The user's class that is imported and run, ``package.module:Class``, or the model whose own code is."""
        return None

    def describe(self) -> ModelInfo:
        """Describe the model. Raises ValueError or FileNotFoundError that names the fix.

        Neither weights nor torch are loaded (a custom class may import anything), and hub models are not looked up, so
        that planning is fast and works offline.
        """
        raise NotImplementedError

    def load(self, name: str, device: str) -> Any:
        """Load the model, ``name`` in the config, with its weights on a device.

        Raises ValueError, OSError, or what the model raises.
        """
        module, _, function = self.loader.partition(":")
        runtime = importlib.import_module("teachers.runtime.accelerator")
        precision = "bf16" if self.precision == "fp8" else self.precision  # of all that fp8 does not replace
        accelerator = runtime.Accelerator(device, precision)
        return getattr(importlib.import_module(module), function)(self, accelerator)

    def finer(self) -> ModelSpec:
        """A copy whose layers are stored without codebooks, to fit codebooks to what they have."""
        return self

    def plain(self) -> Self:
        """A copy with every fast path off. A precision of fp8 keeps what it needs."""
        return self.model_copy(update=dict.fromkeys(self.fast_paths, False))

    def stated_by(self, model: Any) -> dict[str, Any]:
        """Entries of dataset.json of the loaded model besides its identity."""
        return {}

    def hosts(self) -> Iterator[str]:
        """Where the weights come from, unless they are local files or at a URL of the config."""
        return iter(())


class TeacherSpec(ModelSpec):
    """One entry of ``teachers:``."""

    section: ClassVar[str] = "teachers"
    label: ClassVar[str] = "teacher {}"
    methods: ClassVar[tuple[str, ...]] = ("encode_images", "encode_texts")
    fast_paths: ClassVar[tuple[str, ...]] = ("held_weights", "fused_attention", "compile")

    logit_scale: float | None = Field(
        None, gt=0, description="1/temperature used in distillation; default: the model's own"
    )
    codec: str = Field(
        "float16",
        description="how embeddings are stored: float16, float32, int8, or smaller as in docs/codecs.md: first256, "
        "pca128, pq96, rq32 and others",
    )
    codec_sample: int = Field(
        32_768,
        ge=1,
        description="codecs with a codebook: vectors of the first shards to which it is fitted, once for each layer",
    )
    patches: Patches | None = Field(None, description="patch features that are stored, too; default: none")
    compile: bool | None = Field(
        None,
        description="compile blocks of the image tower that are alike (torch.compile) when a worker starts; default: "
        "on CUDA, if that works",
    )
    held_weights: bool | None = Field(
        None,
        description="cast the weights of products to `precision` once instead of in each pass; default: on CUDA, where "
        "embeddings stay equal bit for bit",
    )
    fused_attention: bool | None = Field(
        None,
        description="compute attention without copies between its products; default: on CUDA, where embeddings stay "
        "equal up to rounding",
    )

    @model_validator(mode="after")
    def _check_fp8(self) -> TeacherSpec:
        if self.precision == "fp8" and self.fused_attention is False:
            raise ValueError("`precision: fp8` needs attention without copies: remove `fused_attention: false`")
        return self

    def finer(self) -> TeacherSpec:
        patches = self.patches and self.patches.picking()
        return self.model_copy(update={"codec": "float16", "patches": patches})

    @property
    def stated(self) -> Mapping[str, Any]:
        """``dim`` and ``image`` (preprocessing) as far as they are known without loading the model."""
        return {}

    def stated_by(self, model: Teacher) -> dict[str, Any]:
        image = getattr(model, "image", None)
        scale = getattr(model, "logit_scale", None)
        return {"dim": model.dim, "logit_scale": scale, "image": asdict(image) if image else None}


class Clean(BaseModel):
    """Cleaning of captions before they are stored. White space becomes single spaces, empty captions are dropped."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    first_sentence: bool = Field(False, description="keep only the first sentence")
    words: int | None = Field(None, ge=1, description="maximum words; longer captions are cut")
    characters: int | None = Field(None, ge=1, description="maximum characters; longer captions are cut between words")
    drop: tuple[Literal["repetitive", "duplicates"], ...] = Field(
        ("repetitive", "duplicates"),
        strict=False,
        description="repetitive: drop captions in which a phrase occurs three times in a row; duplicates: repeated "
        "captions of an image, ignoring case",
    )


def check_lengths(spec: _Lengths) -> _Lengths:
    """Check ``min_length`` and ``max_length`` in tokens, as a validator. Raises ValueError."""
    if spec.min_length + 2 > spec.max_length:
        raise ValueError("max_length must be at least min_length + 2 (start and end count)")
    return spec


class CaptionerSpec(ModelSpec):
    """One entry of ``captioners:``.

    ``strategy`` is the decoding strategy and decides which of the fields below it are used. Sampling strategies
    (nucleus, top_k) are seeded per (key, caption index); the others depend on the image alone.
    """

    section: ClassVar[str] = "captioners"
    label: ClassVar[str] = "captioner {}"
    methods: ClassVar[tuple[str, ...]] = ("caption",)
    fast_paths: ClassVar[tuple[str, ...]] = ("fused_attention", "compile", "graphs")

    captions: int = Field(
        5,
        ge=1,
        le=64,
        description="captions per image; 1 for greedy, at most `beams` for beam search; of a class by default its own",
    )
    prompt: str | None = Field(None, min_length=1, description="instruction for a chat model")
    image_size: int | None = Field(
        None, ge=8, description="side in pixels of the square image for chat models that accept any resolution"
    )
    strategy: Literal["nucleus", "top_k", "greedy", "beams", "diverse_beams"] = Field(
        "nucleus",
        description="nucleus: sample from the most probable tokens that sum to `top_p`; top_k: sample from the `top_k` "
        "most probable tokens; greedy: the most probable token; beams: beam search; diverse_beams: beam search in "
        "groups that avoid each other's tokens",
    )
    temperature: float = Field(1.0, gt=0, description="nucleus and top_k: softmax temperature")
    top_p: float = Field(0.9, gt=0, le=1, description="nucleus: probability mass of the tokens")
    top_k: int = Field(50, ge=1, description="top_k: number of tokens")
    beams: int = Field(6, ge=2, le=64, description="beams and diverse_beams: number of beams")
    groups: int = Field(3, ge=2, description="diverse_beams: number of groups of equal size")
    length_penalty: float = Field(
        1.0,
        description="beams and diverse_beams: the score is log-probability / length ** length_penalty; 0 favors short "
        "captions",
    )
    repetition_penalty: float = Field(
        1.0, ge=1, description="all strategies: penalty of tokens that the caption already contains (CTRL); 1 is none"
    )
    min_length: int = Field(5, ge=0, description="minimum tokens before the end token")
    max_length: int = Field(30, ge=2, description="maximum tokens, start and end included")
    compile: Literal["auto"] | bool = Field(
        "auto",
        description="CoCa: compile decoding steps (torch.compile) when a worker starts; auto: on CUDA, if that works; "
        "true: on CPUs too; false: neither this nor `graphs`",
    )
    graphs: bool | None = Field(
        None,
        description="CoCa on CUDA: launch each decoding step as one CUDA graph; default: unless `compile` is false",
    )
    fused_attention: bool | None = Field(
        None,
        description="CoCa on CUDA: compute the image tower with weights held in `precision` and attention without "
        "copies; default: true",
    )
    clean: Clean | None = Field(
        None, description="cleaning of captions before they are stored; dropped ones are replaced by the others"
    )

    @model_validator(mode="after")
    def _check_precision(self) -> CaptionerSpec:
        if self.precision == "fp8":
            raise ValueError("`precision: fp8` is for image towers of teachers: set bf16 or auto")
        return self

    _check_lengths = model_validator(mode="after")(check_lengths)

    @model_validator(mode="after")
    def _check_strategy(self) -> CaptionerSpec:
        for field in sorted(self.model_fields_set - set(_STRATEGIES[self.strategy])):
            if users := [name for name, used in _STRATEGIES.items() if field in used]:
                raise ValueError(
                    f"`{field}` is not used by strategy {self.strategy}: remove it, or set `strategy` to "
                    f"{' or '.join(users)}"
                )
        if self.strategy == "greedy" and self.captions > 1:
            raise ValueError(
                "strategy greedy gives one caption per image: set `captions: 1`, or use a sampling strategy"
            )
        if "beams" in _STRATEGIES[self.strategy] and self.captions > self.beams:
            raise ValueError(
                f"`captions: {self.captions}` exceeds `beams: {self.beams}`: set `beams` to {self.captions} or more"
            )
        if self.strategy == "diverse_beams" and self.beams % self.groups:
            raise ValueError(f"{self.beams} beams cannot be divided among {self.groups} groups of equal size")
        return self

    @property
    def count(self) -> int:
        """Captions of an image: ``captions``, or the number of the user's class where the config states none."""
        return self.captions

    @property
    def uses_graphs(self) -> bool:
        """Whether decoding steps are CUDA graphs, on CUDA."""
        return self.compile is not False if self.graphs is None else self.graphs

    @property
    def rows_per_image(self) -> int:
        """Captions of an image that are decoded in parallel."""
        return self.beams if "beams" in _STRATEGIES[self.strategy] else self.captions

    def decoding(self) -> dict[str, Any]:
        """Options that determine the chosen tokens, as part of the model's identity."""
        used = {field: getattr(self, field) for field in ("captions", *_STRATEGIES[self.strategy], *_LENGTHS)}
        used |= {"diversity": DIVERSITY} if "groups" in used else {}
        strategy = {} if self.strategy == "nucleus" else {"strategy": self.strategy}
        penalty = {} if self.repetition_penalty == 1 else {"repetition_penalty": self.repetition_penalty}
        return {**used, **strategy, **penalty}


#: Log-probability that a token costs a group for each beam of an earlier group that chose it; the middle of the range
#: that the paper of diverse beams recommends.
DIVERSITY = 0.5
#: Fields that apply to some strategies only.
_STRATEGIES: dict[str, tuple[str, ...]] = {
    "nucleus": ("temperature", "top_p"),
    "top_k": ("temperature", "top_k"),
    "greedy": (),
    "beams": ("beams", "length_penalty"),
    "diverse_beams": ("beams", "groups", "length_penalty"),
}
_LENGTHS = ("min_length", "max_length")
#: Fields that only chat models use.
CHAT_FIELDS = ("prompt", "image_size")
#: All decoding fields; custom classes do not use them.
DECODING_FIELDS = (
    *("strategy", "temperature", "top_p", "top_k", "beams", "groups", "length_penalty"),
    *("repetition_penalty", *_LENGTHS, "compile", "graphs", "fused_attention"),
)


#: Stands for the true caption in a prompt.
CAPTION = "{caption}"


class CaptionReaderSpec(CaptionerSpec):
    """Keys of captioners that may read the true caption, such as to translate it."""

    sees: Literal["caption", "both"] | None = Field(
        None,
        description="openai and transformers: what the model sees. caption: the true caption, in place of {caption} in "
        "the prompt, such as for its translation; both, of openai: the image, too; default: the image",
    )

    @model_validator(mode="after")
    def _check_prompt(self) -> CaptionReaderSpec:
        if self.sees is not None and self.prompt is not None and CAPTION not in self.prompt:
            raise ValueError(f"`sees: {self.sees}` needs {CAPTION} in the prompt, where the true caption is to be")
        return self
