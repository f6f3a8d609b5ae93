"""The loaded models of a worker, and the accelerator that they share."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from reinforce.config import Config
from reinforce.dataset.augment.backends import load_backend
from reinforce.dataset.kinds.registry import KINDS
from reinforce.dataset.layers import Layer, LayerKind
from reinforce.dataset.targets import TargetEncoder
from reinforce.engine.inference.batch_sizes import BatchSizes, rows_per_batch
from reinforce.engine.inference.outputs import Floats, copied, encode, to_scores
from reinforce.engine.messages.tracebacks import user_frames
from reinforce.engine.record.rates import Cost
from reinforce.errors import UserError
from reinforce.processes.fast_paths import use_accelerator
from teachers.protocols import Captioner, ImageSpec, NoCaptions, Scorer, Teacher
from teachers.registry import load_model
from teachers.runtime.accelerator import Accelerator
from teachers.runtime.determinism import is_without_engine
from teachers.runtime.memory import is_out_of_memory, release_cache


@dataclass
class Counters:
    """Counts of a worker (read by the driver while shards run) or of one of its shards."""

    samples: int = 0
    busy: float = 0.0  # seconds in which the accelerator worked


#: Batches to keep: those of the row groups in work, since each teacher encodes all texts of a row group in turn.
_MAX_BATCHES = 64
#: What a captioner divides ``generate`` into.
_ENCODE_DECODE = ("encode", "decode")


class TokenCache:
    """The tokens of the last batches, by tokenizer and texts."""

    def __init__(self) -> None:
        self._tokens: OrderedDict[tuple[Hashable, tuple[str, ...]], Any] = OrderedDict()

    def get(self, tokenizer: Hashable | None, texts: Sequence[str], tokenize: Callable[[Sequence[str]], Any]) -> Any:
        """The tokens of a batch, a copy of its own for each call: a model may change them, or reuse their memory.

        Nothing is kept for ``tokenizer`` None, which equals no other.
        """
        if tokenizer is None:
            return copied(tokenize(texts))
        entry = (tokenizer, tuple(texts))
        if entry not in self._tokens:
            self._tokens[entry] = copied(tokenize(texts))
            if len(self._tokens) > _MAX_BATCHES:
                self._tokens.popitem(last=False)
        self._tokens.move_to_end(entry)
        return copied(self._tokens[entry])


class PriorityLock:
    """A lock that the oldest waiting shard gets first.

    If two shards of equal length alternated, they would also end together, and the accelerator would wait until the
    first images of the next two are decoded. So the older shard comes first, and the younger one is decoded ahead.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int]] = []  # a heap of (order, ticket)
        self._tickets = itertools.count()
        self._numbers = itertools.count(1)
        self._taken = False

    def next_order(self) -> int:
        """Return the number of a shard that begins, which is above those of all older shards."""
        return next(self._numbers)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @contextlib.contextmanager
    def take(self, order: int) -> Iterator[None]:
        """Hold the lock. Among equal ``order``, the thread that has waited longest comes first."""
        with self._changed:
            entry = (order, next(self._tickets))
            heapq.heappush(self._waiting, entry)
            self._changed.wait_for(lambda: not self._taken and self._waiting[0] == entry)
            heapq.heappop(self._waiting)
            self._taken = True
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()


@dataclass
class Models:
    """The loaded models of a worker, by section and name, and the accelerator they share, one batch at a time."""

    loaded: Mapping[str, Mapping[str, Any]]
    accelerator: Accelerator
    counters: Counters = field(default_factory=Counters)
    lock: PriorityLock = field(default_factory=PriorityLock)  # of the accelerator
    batches: BatchSizes = field(default_factory=BatchSizes)
    costs: Mapping[str, Cost] = field(default_factory=dict)  # of layers, where they are known
    uncompared: set[str] = field(default_factory=set)  # teachers in fp8 that are still to be compared with bf16
    _encoders: dict[tuple[str, str], TargetEncoder] = field(default_factory=dict)
    _tokenizing: threading.Lock = field(default_factory=threading.Lock)
    _tokens: TokenCache = field(default_factory=TokenCache)

    @property
    def teachers(self) -> Mapping[str, Teacher]:
        return self.loaded.get("teachers", {})

    @property
    def captioners(self) -> Mapping[str, Captioner]:
        return self.loaded.get("captioners", {})

    def encoder(self, kind: LayerKind, name: str) -> TargetEncoder:
        """What computes layers of a kind from the model of a name. Raises UserError if it cannot."""
        key, section = (kind.name, name), str(kind.section)
        if key not in self._encoders:
            try:
                with torch.inference_mode():
                    self._encoders[key] = kind.encoder(self.loaded[section][name], self.accelerator.device)
            except ValueError as error:
                raise UserError(f"{section}.{name}.{kind.name}: {error}{user_frames(error)}") from error
        return self._encoders[key]

    def of(self, layer: Layer) -> Any:
        """The model of a layer, None if no model makes it."""
        section, name = layer.owner
        return self.loaded.get(str(section), {}).get(str(name))

    def encode_images(self, teacher: Teacher, pixels: torch.Tensor) -> torch.Tensor:
        """Encode pixels, which the teacher may change, on the accelerator -> [B, dim], which no later call changes."""
        return encode(teacher, "encode_images", pixels, len(pixels))

    def text_encoder(self, teacher: Teacher, texts: Sequence[str]) -> Callable[[], torch.Tensor]:
        """A function that encodes ``texts`` on the accelerator. They are tokenized now if the teacher supports it.

        Teachers with one tokenizer share the tokens of a batch.
        """
        if not _splits(teacher, "encode_texts", "tokenize", "encode_tokens"):
            return partial(encode, teacher, "encode_texts", texts, len(texts))
        splitting: Any = teacher
        key: Hashable | None = getattr(teacher, "tokenizer_key", None)
        with self._tokenizing:
            tokens = self._tokens.get(key, texts, splitting.tokenize)
        return partial(encode, teacher, "encode_tokens", tokens, len(texts))

    def draw(self, captioner: Captioner, seeds: npt.NDArray[np.uint64]) -> npt.NDArray[Any]:
        """Seeds, or the numbers that a captioner draws from them while others use the accelerator."""
        splitting: Any = captioner
        return splitting.draw(seeds) if _splits(captioner, "caption", "draw", "generate", "to_texts") else seeds

    @staticmethod
    def by_group(captioner: Captioner) -> bool:
        """Whether a captioner decodes the images of a row group together."""
        parts = _splits(captioner, "caption", "generate", "to_texts") and _splits(
            captioner, "generate", *_ENCODE_DECODE
        )
        return parts and bool(getattr(captioner, "by_group", False))

    def captions(
        self, captioner: Captioner, pixels: Any, seeds: npt.NDArray[Any], true: Sequence[str | None] = ()
    ) -> tuple[Callable[[], Sequence[list[str] | NoCaptions | None]], int]:
        """Caption on the accelerator -> a function that returns the texts and needs no accelerator, and the number of
        tokens, 0 if unknown. ``pixels`` are None for captioners that see no images, and ``true`` captions are for those
        that read them."""
        if not _splits(captioner, "caption", "generate", "to_texts"):
            texts = copied(captioner.caption(pixels, seeds))
            return lambda: texts, 0
        splitting: Any = captioner
        given = (list(true),) if true and getattr(captioner, "reads_captions", False) else ()
        tokens = copied(splitting.generate(pixels, seeds, *given))
        return lambda: copied(splitting.to_texts(tokens)), count_tokens(tokens)

    def score(self, scorer: Scorer, inputs: Sequence[Any], count: int, names: Sequence[str]) -> Floats:
        """Score ``count`` samples on the accelerator -> [count, names]. Raises ValueError for another shape."""
        return to_scores(scorer.score(*inputs), count, names, type(scorer).__name__)

    def release_memory(self) -> None:
        """Return memory that models keep between batches, and that torch keeps for them, to the device.

        Call it while no other thread uses the accelerator.
        """
        for model in itertools.chain.from_iterable(of.values() for of in self.loaded.values()):
            if callable(release := getattr(model, "release_memory", None)):
                release()
        release_cache(self.accelerator.device)

    @contextlib.contextmanager
    def use_accelerator(self, order: int = 0) -> Iterator[None]:
        """Exclusive use of the accelerator; the lowest ``order`` of those that wait comes first."""
        with self.lock.take(order), torch.inference_mode():
            yield


def crops_per_batch(models: Models, config: Config) -> int:
    """Augmented images of a full batch."""
    rows = models.batches.fitting("rows", rows_per_batch(config))
    return models.batches.fitting("crops", rows * config.augmentations.count)


def load_models(config: Config, layers: Iterable[Layer]) -> Models:
    """Load the models that make ``layers``, as ``accelerator`` of the config says.

    Raises UserError if one, or the augmentation backend, cannot be loaded.
    """
    use_accelerator(config.accelerator)
    load_backend(config.augmentations.backend)  # decode processes use it; here an error ends the run
    layers = [layer for layer in layers if layer.loads_model]
    device = "cuda" if config.workers.gpus else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "a worker has a GPU, but torch does not see it. Install a torch that supports it, or set workers.gpus to 0."
        )
    owners = {layer.owner for layer in layers}
    try:
        loaded = {
            section: {name: load_model(name, spec, device) for name, spec in specs.items() if (section, name) in owners}
            for section, specs in config.models.items()
        }
        models = Models(loaded, Accelerator(device))
    except (ValueError, OSError, ImportError, RuntimeError, TypeError) as error:
        raise UserError(f"{error}{user_frames(error)}{memory_hint(error)}") from error
    for name, teacher in models.teachers.items():
        if note := size_note(name, teacher.image, config.augmentations.size):
            models.batches.note(note)
    return models


def memory_hint(error: BaseException) -> str:
    """What to do about an error of a few inputs or of loading, if it is one of memory or of a convolution without an
    algorithm, which may lack memory, else an empty text."""
    if is_without_engine(error):
        return (
            ". cuDNN has no algorithm for a convolution of this model, or no memory for one. Set workers.deterministic "
            "to false: a shard that is computed again may then differ in rounding. Or set another `precision`."
        )
    if not is_out_of_memory(error):
        return ""
    return (
        ". The models of the config do not fit in the memory of the device together. Use smaller ones or `precision: "
        "bf16`, compute some of the layers in a run of their own, or use a device with more memory, or one that no "
        "other program uses."
    )


def size_note(name: str, image: ImageSpec | None, crops: int) -> str | None:
    """A line about a teacher of images larger than the crops, of ``crops`` x ``crops`` pixels, that it gets."""
    if image is None or max(image.height, image.width) <= crops:
        return None
    return (
        f"teachers.{name}: crops of {crops} x {crops} pixels are enlarged to its {image.height} x {image.width}; "
        "augmentations.size, which is chosen once for a dataset, can be as large"
    )


def on_this_machine(config: Config) -> Config:
    """The config with the GPU of this process for its models, if there is one and ``workers.gpus`` is not 0."""
    gpus = float(torch.cuda.is_available() and config.workers.gpus != 0)
    return config.model_copy(update={"workers": config.workers.model_copy(update={"gpus": gpus})})


def describe_loaded(models: Models, config: Config) -> dict[tuple[str, str], dict[str, Any]]:
    """Entries of dataset.json of each loaded model besides its identity, by section and name."""
    specs = config.models
    stated = {
        (section, name): specs[section][name].stated_by(model)
        for section, of in models.loaded.items()
        for name, model in of.items()
    }
    for (section, name), of_model in stated.items():
        for kind in KINDS.values():
            if kind.asked and kind.section == section and kind.asks(specs[section][name]):
                of_model[kind.name] = models.encoder(kind, name).entry
    return stated


def count_tokens(captions: object) -> int:
    """Tokens of captions as lists of tokens, by image; 0 for what a captioner prepares in another form."""
    images = captions if isinstance(captions, list) else []
    texts = [text for image in images if isinstance(image, list) for text in image]
    return sum(map(len, texts)) if all(isinstance(text, list) for text in texts) else 0


def _splits(model: object, whole: str, *parts: str) -> bool:
    """Whether ``parts`` replace the method ``whole``: no class below theirs overrides it."""
    defined = {name: _definer(type(model), name) for name in (whole, *parts)}
    owner = defined.pop(whole)
    return owner is not None and all(part is not None and issubclass(part, owner) for part in defined.values())


def _definer(kind: type, method: str) -> type | None:
    """The class from which ``kind`` has a method, or None."""
    return next((base for base in kind.__mro__ if method in vars(base)), None)
