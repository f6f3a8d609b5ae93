"""The loaded models of a worker, the accelerator that they share, and the sizes of their batches.

Outputs of models are checked, and copied before any model is called again, since a model may reuse their memory.

Sizes of batches are halved where the memory of the device runs out. The shards of a worker share the sizes, and a size
that was halved stays so. The batches are then cut as with a smaller ``workers.batch``. Several batches may be on the
device: one computes while those of the same and of the other shard that come next are copied. After the first shortage
it is one at a time, so that the others are not the cause of the next shortage.
"""

from __future__ import annotations

import contextlib
import copy
import heapq
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from reinforce.config import Config
from reinforce.dataset.kinds.registry import KINDS
from reinforce.dataset.layers import Layer, LayerKind, TargetEncoder
from reinforce.dataset.vectors import NORM_TOLERANCE
from reinforce.engine.messages import LayerFailure, error_with_frames, shorten, user_frames
from reinforce.engine.rates import Cost
from reinforce.errors import UserError
from reinforce.images.backends import load_backend
from reinforce.settings import use_accelerator
from teachers.protocols import Captioner, ImageSpec, NoCaptions, Scorer, Teacher
from teachers.redact import Redactor
from teachers.registry import load_model
from teachers.runtime.accelerator import Accelerator, forget_frames, is_out_of_memory, release_cache
from teachers.runtime.determinism import is_without_engine

Floats = npt.NDArray[np.float32]
_T = TypeVar("_T")


def copied(value: _T) -> _T:
    """A copy of tensors and arrays, also inside of lists, tuples and mappings; other objects are kept."""
    found: Any = value
    if isinstance(found, torch.Tensor):
        found = _clone(found)
    elif isinstance(found, np.ndarray):
        found = found.copy()
    elif isinstance(found, MutableMapping):
        found = copy.copy(found)
        for key, item in found.items():
            found[key] = copied(item)
    elif type(found) in (list, tuple):
        found = type(found)(map(copied, found))
    result: _T = found
    return result


def encode(teacher: Teacher, method: str, inputs: Any, count: int) -> torch.Tensor:
    """A copy of the embeddings [count, dim] that a method of a teacher returns. Raises ValueError for another shape."""
    out: object = getattr(teacher, method)(inputs)
    wanted = (count, teacher.dim)
    if isinstance(out, torch.Tensor) and tuple(out.shape) == wanted:
        return _clone(out)
    where = f"{type(teacher).__name__}.{method}()"
    if not isinstance(out, torch.Tensor):
        fix = "; return torch.from_numpy of it" if isinstance(out, np.ndarray) else ""
        raise ValueError(
            f"embeddings must be a torch.Tensor of shape {wanted}, got type {type(out).__name__} from {where}{fix}"
        )
    raise ValueError(f"embeddings must have shape {wanted}, got {tuple(out.shape)} from {where}; correct it or `dim`")


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    """A copy; on CPUs by this thread alone, because torch's own threads would wait actively after a large one."""
    if tensor.device.type == "cpu" and tensor.dtype == torch.float32:
        return torch.from_numpy(tensor.detach().numpy().copy())
    return tensor.clone()


def to_numpy(out: torch.Tensor, ignored: npt.NDArray[np.bool_] | None = None) -> Floats:
    """Embeddings [rows, dim] on the CPU as float32.

    Raises ValueError unless they have norm 1. The norm of ``ignored`` rows [rows] and of rows with NaN or infinity is
    not checked.
    """
    values: Floats = out.float().cpu().numpy()
    norms = np.sqrt(np.einsum("ij,ij->i", values, values))
    wrong = ~(np.abs(norms - 1) <= NORM_TOLERANCE)
    if ignored is not None:
        wrong &= ~ignored
    if wrong.any():
        wrong[wrong] = np.isfinite(values[wrong]).all(axis=1)
        for row in np.flatnonzero(wrong)[:1]:
            raise ValueError(
                f"embeddings must have norm 1, got {norms[row]:.3f} in row {row + 1} of {len(out)}; normalize them"
            )
    return values


#: Largest batch of ``workers.batch: auto``. Larger ones take more shared memory for pixels.
MAX_AUTO_BATCH = 1024
#: Least texts of a batch on accelerators: with fewer, launching the kernels of a text tower is estimated to take longer
#: than running them.
_LEAST_TEXTS = 1024
_CAUSE_CHARS = 500
Bound = Literal["rows", "crops", "texts", "samples"]
_UNITS: dict[Bound, str] = {"rows": "image", "crops": "augmented image", "texts": "text", "samples": "sample"}


@dataclass(frozen=True)
class Demand:
    """Memory that a batch needs on the device, for messages when it does not fit.

    Attributes:
        bound: what is halved.
        one: the layer and a single input of it, with a verb: "captions/c: one image with its 5 captions does".
        fix: what the user can change if a single input does not fit.
    """

    bound: Bound
    one: str
    fix: str


@dataclass(frozen=True)
class OutOfMemory:
    """The failure that ``attempt`` returns instead of raising: the layer whose model raised, None for a copy, and the
    text."""

    layer: str | None
    text: str


def attempt(work: Callable[[], _T]) -> _T | OutOfMemory:
    """The result of ``work``, or OutOfMemory. Then nothing refers any more to what the functions in it have held."""
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        layer = error.layer if isinstance(error, LayerFailure) else None
        text = str(error.args[1]) if isinstance(error, LayerFailure) else error_with_frames(error)
        forget_frames(error)
    return OutOfMemory(layer, text)


COPYING = Demand(
    "rows", "copying images: the pixels of one image do", "a smaller augmentations.count or augmentations.size"
)


def rows_per_batch(config: Config) -> int:
    """Rows whose augmented images make a batch."""
    return max(1, config.workers.images // config.augmentations.count)


def texts_per_batch(config: Config) -> int:
    images = config.workers.images
    return max(images, _LEAST_TEXTS) if config.workers.gpus else images


class BatchSizes:
    """Bounds of batches by what they consist of; without one, the config decides."""

    def __init__(self) -> None:
        self._bounds: dict[Bound, int] = {}
        self._notes: list[str] = []
        self._changed = threading.Condition()
        self.short = False  # one batch at a time, after a shortage, until `end_of_search`
        self._holding = 0  # batches on the device

    def fitting(self, bound: Bound, count: int) -> int:
        """How many of ``count`` inputs fit: rows of a batch, augmented images or texts of a forward pass, or samples
        that a scorer gets without their images."""
        return min(count, self._bounds.get(bound, count))

    def note(self, text: str) -> None:
        """Add a message to those of ``take_notes``."""
        with self._changed:
            self._notes.append(text)

    def take_notes(self) -> tuple[str, ...]:
        """Messages since the last call: about sizes that were halved, and others."""
        with self._changed:
            notes, self._notes = tuple(self._notes), []
        return notes

    @contextlib.contextmanager
    def on_device(self) -> Iterator[bool]:
        """Hold tensors on the device. After a shortage, one batch at a time can do so.

        Yields whether others may hold some, so that a batch is to be copied before its turn, and not in it.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self.short or not self._holding)
            shared = not self.short
            self._holding += 1
        try:
            yield shared
        finally:
            with self._changed:
                self._holding -= 1
                self._changed.notify_all()

    def end_of_search(self) -> bool:
        """Whether there was a shortage, after which several smaller batches may be on the device again."""
        with self._changed:
            found, self.short = self.short, False
        return found

    def halve(self, shortage: OutOfMemory, demand: Demand, size: int, config: Config, shared: bool) -> None:
        """Halve the size of a batch of ``size`` inputs that did not fit.

        Raises UserError for a single input, unless the device was ``shared``.
        """
        bound, count = demand.bound, config.augmentations.count
        failed = self.fitting("crops", count) if bound == "crops" else size
        rows, images = rows_per_batch(config), config.workers.images
        planned: dict[Bound, int] = {"rows": rows, "crops": count, "texts": texts_per_batch(config), "samples": images}
        text = Redactor(config.model_dump(mode="json")).cut(shortage.text)
        shortage = replace(shortage, text=shorten(text, _CAUSE_CHARS))
        with self._changed:
            self.short = True
            if failed > 1:
                before = after = self._bounds.get(bound, max(failed, planned[bound]))
                while after > 1 and after >= failed:
                    after //= 2
                self._bounds[bound] = after
                if after < before:
                    unit = _UNITS[bound]
                    self._notes.append(
                        f"{shortage.layer or 'copying images'}: {failed:,} {unit}s at once do not fit in the memory of "
                        f"the device; from now on {after:,} {unit}{'s' * (after > 1)} at once. Cause: {shortage.text}"
                    )
        if failed == 1 and not shared:
            raise UserError(
                f"{demand.one} not fit in the memory of the device. Use {demand.fix}; or a device with more memory, "
                f"or one that no other program uses. The error was {shortage.text}"
            )


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
        self.orders = itertools.count(1)  # of shards that begin, each above those of all older ones
        self._taken = False

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
class LoadedModels:
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
        """Score ``count`` samples on the accelerator -> a copy [count, names] on the CPU. Raises ValueError for another
        shape."""
        out: object = scorer.score(*inputs)
        values = np.array(out.detach().float().cpu() if isinstance(out, torch.Tensor) else out)
        if values.dtype.kind not in "fiu" or values.shape not in {(count, len(names)), (count,) * (len(names) == 1)}:
            known = isinstance(out, torch.Tensor | np.ndarray)
            found = f"{values.dtype} {values.shape}" if known else type(out).__name__
            raise ValueError(
                f"{type(scorer).__name__}.score() must return numbers of shape {(count, len(names))}, one for each of "
                f"{count} samples and each of {', '.join(names)}, got {found}"
            )
        return values.astype(np.float32).reshape(count, len(names))

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


def load_models(config: Config, layers: Iterable[Layer]) -> LoadedModels:
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
        models = LoadedModels(loaded, Accelerator(device))
    except (ValueError, OSError, ImportError, RuntimeError, TypeError) as error:
        raise UserError(f"{error}{user_frames(error)}{memory_hint(error)}") from error
    for name, teacher in models.loaded.get("teachers", {}).items():
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


def describe_loaded(models: LoadedModels, config: Config) -> dict[tuple[str, str], dict[str, Any]]:
    """Entries of dataset.json of each loaded model besides its identity, by section and name."""
    specs = config.models
    stated = {
        (section, name): specs[section][name].stated_by(model)
        for section, of in models.loaded.items()
        for name, model in of.items()
    }
    for (section, name), of_model in stated.items():
        for kind in KINDS.values():
            if kind.section != section or kind.target_section in (section, None):
                continue
            if getattr(specs[section][name], str(kind.target_section), None) is not None:
                of_model[kind.name] = models.encoder(kind, name).entry
    return stated


def count_tokens(captions: object) -> int:
    """Tokens of captions as lists of tokens, by image; 0 for what a captioner prepares in another form."""
    images = captions if isinstance(captions, list) else []
    texts = [text for image in images if isinstance(image, list) for text in image]
    return sum(map(len, texts)) if all(isinstance(text, list) for text in texts) else 0


def _splits(model: object, whole: str, *parts: str) -> bool:
    """Whether ``parts`` replace the method ``whole``: no class below theirs overrides it."""
    kinds = type(model).__mro__
    defined = {name: next((base for base in kinds if name in vars(base)), None) for name in (whole, *parts)}
    owner = defined.pop(whole)
    return owner is not None and all(part is not None and issubclass(part, owner) for part in defined.values())
