"""Self-test of the loaded models before a run: small forward passes and a full batch, whose outputs are checked.

Of each encoder of a teacher it requires, on a batch of three inputs, that

- the shape is [3, dim], every value is finite and every norm is within ``NORM_TOLERANCE`` of 1,
- the same batch gives the same embeddings again,
- different inputs give different embeddings,
- the batch gives what each input gives alone, and so does a full batch, in which the three are repeated at random.

How close is close enough depends on the precision: see ``TOLERANCES``. A teacher in fp8 is also compared with itself in
bf16, on the first crops of each worker, before a file of them is written.

Of a captioner it requires ``captions`` texts for each image, that the same images and seeds give the same texts again,
and that some caption of a batch begins as it does for its image alone. It does not require more, because the rounding
of matrix products may depend on the batch and change a sampled word. In a full batch, at least twice as many captions
must begin as those of their image than as those of another. Different images may get the same caption. Of one that is
not ``repeatable`` it requires texts alone, or reasons why there are none.

Of a scorer that sees pixels and captions alone, and of another model that computes numbers, it requires finite numbers,
the same ones again, and in a batch those of each sample alone. Other scorers are not tested: what is in metadata and
vectors is not known.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch

from reinforce.config import Config
from reinforce.engine.messages import user_frames
from reinforce.engine.worker.models import Floats, LoadedModels, memory_hint, to_numpy
from reinforce.errors import UserError
from teachers.custom import PIXELS
from teachers.pixels import to_pixels
from teachers.protocols import ImageSpec, NoCaptions
from teachers.spec import Precision

#: The first two have the same numbers of words and letters; the third is longer.
TEXTS = (
    "a cat in the sun",
    "a dog on the bed",
    "two children in red coats fly a kite on a wide beach in the evening",
)
LONG_TEXT = "a photo of two children in red coats who fly a kite on a wide beach in the evening, " * 6
_IMAGES = 3  # and texts
_CAPTIONED_IMAGES = 2
_COMPARED_CHARACTERS = 24  # at the start of a caption
#: In a batch, scores may differ by this share of the largest of the test, and by so much anyway; again, by a tenth.
_SCORE_TOLERANCE, _SCORE_DIFFERENCE = 0.05, 1e-3
#: Bounds of a full batch on CPUs, where one of a large model would take longer than workers may take to start, and one
#: of a small model a noticeable part of a small run.
_SECONDS, _LEAST_BATCH, _LARGEST_BATCH = 5.0, 8, 64
#: Returns a function that computes a batch on the accelerator, given the test input of each of its rows.
Start: TypeAlias = Callable[[Sequence[int]], Callable[[], Any]]


@dataclass(frozen=True)
class Tolerance:
    """``batch`` is the least cosine between an input's embeddings in a batch and alone, ``repeat`` between two passes
    over one batch. Embeddings that differ by at most ``equal`` in every component are the same."""

    batch: float
    repeat: float
    equal: float


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(batch=0.999, repeat=0.9999, equal=1e-6),
    "tf32": Tolerance(batch=0.99, repeat=0.999, equal=1e-6),
    "bf16": Tolerance(batch=0.99, repeat=0.999, equal=1e-4),
    "fp16": Tolerance(batch=0.99, repeat=0.999, equal=1e-4),
    "fp8": Tolerance(batch=0.99, repeat=0.999, equal=1e-4),
}
#: Least cosine between the embeddings of an image in fp8 and in bf16, and the images of which it is computed.
_FP8_COSINE, _FP8_IMAGES = 0.999, 128
_PRECISIONS: dict[torch.dtype, Precision] = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def precisions(config: Config) -> dict[tuple[str, str], Precision]:
    """The precision of the forward passes of each model, by section and name."""
    return {
        (section, name): spec.resolved_precision for section, of in config.models.items() for name, spec in of.items()
    }


def test_rows(size: int) -> list[int]:
    """The test input of each row of a batch."""
    return [place % _IMAGES for place in range(size)]


def of_images(models: LoadedModels, image: ImageSpec | None, run: Callable[[torch.Tensor], Any]) -> Start:
    """Lets a model ``run`` the pixels of test images, preprocessed by ``image``."""

    def start(rows: Sequence[int]) -> Callable[[], Any]:
        pixels = probe_images(models, image, rows)
        return lambda: run(pixels)

    return start


def _run(models: LoadedModels, start: Start, rows: Sequence[int]) -> Any:
    run = start(rows)
    with models.use_accelerator():
        return run()


def check_fp8(models: LoadedModels, name: str, pixels: torch.Tensor) -> None:
    """Compare a teacher in fp8 with itself in bf16 on crops, float32 [B, 3, H, W], in the accelerator's turn.

    It happens once, and afterwards only a teacher in fp8 is held. Raises UserError if they differ too much.
    """
    teacher: Any = models.loaded["teachers"][name]
    pixels = pixels[:_FP8_IMAGES]
    exact = to_numpy(teacher.encode_images_in_bf16(pixels.clone()))
    cosine = _least_cosine(to_numpy(teacher.encode_images(pixels.clone())), exact)
    compared = f"the embeddings of {len(pixels)} crops in fp8 have cosines of at least {cosine:.5f} to those in bf16"
    if not cosine >= _FP8_COSINE:  # nor if it is NaN
        raise UserError(
            f"teachers.{name}: {compared}, and {_FP8_COSINE} is required: set `precision: bf16`, and drop what other "
            "workers have written of it"
        )
    teacher.encode_images_in_bf16 = None
    models.batches.note(f"teachers.{name}: {compared}")


def check_text_encoder(models: LoadedModels, name: str, precision: Precision, batch: int | None = None) -> Floats:
    """Test the text encoder of a teacher -> the norms of its embeddings; as ``check_encoder``."""
    teacher = models.loaded["teachers"][name]

    def start(rows: Sequence[int]) -> Callable[[], Any]:
        if not any(callable(getattr(teacher, method, None)) for method in ("encode_texts", "encode_tokens")):
            raise ValueError(
                "it encodes no texts, as is known of a model of the hub once its config.json is here; run the command "
                "again, or, if workers have another cache than this machine, download the file here first"
            )
        return models.text_encoder(teacher, [TEXTS[row] for row in rows])

    return check_encoder(models, name, "texts", start, precision, batch)


def check_captioner(models: LoadedModels, name: str, count: int, batch: int | None = None) -> None:
    """Test a captioner that writes ``count`` captions for an image. Raises UserError.

    ``batch`` is that of ``check_encoder``; one that is not ``repeatable`` is not asked for it. None: two images.
    """
    captioner = models.loaded["captioners"][name]
    seeds = np.arange(_IMAGES * count, dtype=np.uint64).reshape(_IMAGES, count)
    everything = list(range(_CAPTIONED_IMAGES))

    def caption(rows: list[int]) -> list[list[str]]:
        with models.use_accelerator():
            pixels = captioner.image and probe_images(models, captioner.image, rows)  # translators see none
            captions, _ = models.captions(captioner, pixels, seeds[rows], [TEXTS[row] for row in rows])
        texts = captions()
        lengths = [count if isinstance(row, NoCaptions) else row is not None and len(row) for row in texts]
        if lengths != [count] * len(rows):
            wanted = f"a list of {count} texts for each of {len(rows)} images"
            raise ValueError(f"caption() must return {wanted}, got {texts!r}")
        return [[] if row is None or isinstance(row, NoCaptions) else [*row] for row in texts]

    try:
        if batch is not None:
            if getattr(captioner, "repeatable", True):
                start = time.process_time()
                single = [caption([row])[0] for row in range(_IMAGES)]
                batch = _affordable(models, batch, start)
                rows = _shuffled(batch)
                _check_captions_of_batch(caption(rows), rows, single)
            return
        together = caption(everything)
        if not getattr(captioner, "repeatable", True):
            return
        if (again := caption(everything)) != together:
            pair = next((a, b) for a, b in zip(together, again, strict=True) if a != b)
            raise ValueError(
                f"the same images and seeds get other captions the second time, {pair[0]!r} and {pair[1]!r}; draw all "
                "random numbers from `seeds`"
            )
        alone = [texts for row in everything for texts in caption([row])]
        if any(together) and not _any_begins_alike(together, alone):
            raise ValueError(
                f"images get other captions in a batch, {together!r}, than alone, {alone!r}; caption (b, n) must "
                "depend on image b and seeds[b, n] alone"
            )
    except (Exception, SystemExit) as error:
        raise _failed(name, "captions", captioner, error, batch) from error


def score_probes(
    models: LoadedModels, name: str, inputs: Sequence[str], names: Sequence[str], rows: Sequence[int]
) -> Floats:
    """Score test images and texts -> [rows, names]."""
    scorer = models.loaded["scores"][name]
    pixels = probe_images(models, scorer.image, rows) if PIXELS in inputs else None
    values = [pixels if one == PIXELS else [TEXTS[row] for row in rows] for one in inputs]
    return models.score(scorer, values, len(rows), names)


def check_numbers(models: LoadedModels, name: str, what: str, model: Any, start: Start, batch: int | None) -> None:
    """Test a model that computes numbers, ``what``, [rows, N] of test inputs, as ``check_encoder``."""
    computed = partial(_run, models, start)
    try:
        began = time.process_time()
        alone = np.concatenate([computed([row]) for row in range(_IMAGES)])
        if not np.isfinite(alone).all():
            raise ValueError(f"{what} must be finite, got NaN or infinity; check the weights and the precision")
        rows = [*range(_IMAGES)] if batch is None else _shuffled(_affordable(models, batch, began))
        first = computed(rows)
        allowed = _SCORE_TOLERANCE * np.abs(alone).max(axis=0) + _SCORE_DIFFERENCE
        if batch is None and (np.abs(computed(rows) - first) > allowed / 10).any():
            raise ValueError(f"the same batch gives other {what} the second time; remove what is random")
        if (np.abs(first - alone[rows]) > allowed).any():
            raise ValueError(f"samples get other {what} in a batch than alone; keep the order of the rows")
    except (Exception, SystemExit) as error:
        raise _failed(name, what, model, error, batch) from error


def _check_captions_of_batch(together: list[list[str]], rows: list[int], alone: list[list[str]]) -> None:
    """Compare the captions of a full batch of ``rows`` with those of each image alone. Raises ValueError."""
    own = [_any_begins_alike([texts], [alone[row]]) for texts, row in zip(together, rows, strict=True)]
    mixed = [
        (texts, alone[row])
        for texts, row, right in zip(together, rows, own, strict=True)
        if not right and any(_any_begins_alike([texts], [other]) for other in alone)
    ]
    if 2 * len(mixed) > sum(own):
        raise ValueError(
            f"{len(mixed)} images get the captions of other images, such as {mixed[0][0]!r} for {mixed[0][1]!r}; keep "
            "the order of the rows"
        )
    if any(together) and not any(own):
        raise ValueError(f"images get other captions in a batch, {together[0]!r}, than alone, {alone[rows[0]]!r}")


def _affordable(models: LoadedModels, batch: int, start: float) -> int:
    """The size of a full batch to test; ``start`` is the CPU time of this process before three inputs were computed."""
    if models.accelerator.device.type == "cuda":
        return batch
    seconds = (time.process_time() - start) / _IMAGES / torch.get_num_threads()
    return min(batch, _LARGEST_BATCH, max(_LEAST_BATCH, int(_SECONDS / max(seconds, 1e-6))))


def _shuffled(size: int) -> list[int]:
    """A batch of ``size`` rows, each one of ``_IMAGES`` inputs.

    Whatever the size is from 4, at least 44 % of the rows differ if they are reversed or rotated, or halves exchanged.
    """
    return np.random.default_rng(171).integers(0, _IMAGES, size).tolist()


def _any_begins_alike(a: list[list[str]], b: list[list[str]]) -> bool:
    pairs = ((x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))
    return any(x[:_COMPARED_CHARACTERS] == y[:_COMPARED_CHARACTERS] for x, y in pairs)


def check_encoder(
    models: LoadedModels, name: str, side: str, start: Start, precision: Precision, batch: int | None = None
) -> Floats:
    """Test what a teacher computes, vectors [B, D] of unit norm -> their norms. Raises UserError.

    ``batch`` is the size of a full batch to test, on CPUs of as many inputs as are computed in five seconds, from 8 to
    64; None: three inputs.
    """
    rows, encode = [*range(_IMAGES)], partial(_run, models, start)
    everything = rows
    try:
        began = time.process_time()
        alone = [] if batch is None else [encode([row]) for row in everything]
        if batch is not None:
            batch = _affordable(models, batch, began)
            rows = _shuffled(batch)
        out = encode(rows)
        tolerance = TOLERANCES[_PRECISIONS.get(out.dtype, precision)]
        together = _embeddings(out)
        if batch is None:
            cosine = _least_cosine(together, _embeddings(encode(rows)))
            if cosine < tolerance.repeat:
                raise ValueError(
                    f"the same batch gives other embeddings the second time (cosine {cosine:.5f}, at least "
                    f"{tolerance.repeat} is required); remove what is random, and call `.eval()` on networks with "
                    "dropout or batch norm"
                )
            for one, other in itertools.combinations(range(_IMAGES), 2):
                difference = float(np.abs(together[other] - together[one]).max())
                if difference <= tolerance.equal:
                    pair, cause = "two different images", f"encoder of {side} and `image`"
                    if side == "texts":
                        pair, cause = f"{TEXTS[one]!r} and {TEXTS[other]!r}", "tokenizer and the text encoder"
                    raise ValueError(
                        f"{pair} get the same embedding (largest difference {difference:.1g}); check the {cause}"
                    )
            alone = [encode([row]) for row in everything]
        cosine = _least_cosine(together, np.concatenate([_embeddings(one) for one in alone])[rows])
        if cosine < tolerance.batch:
            raise ValueError(
                f"inputs get other embeddings in a batch than alone (cosine {cosine:.5f}, at least {tolerance.batch} "
                "is required); keep the order of the rows, mask padding, and call `.eval()` on networks with batch norm"
            )
    except (Exception, SystemExit) as error:
        raise _failed(name, side, models.loaded["teachers"][name], error, batch) from error
    norms: Floats = np.linalg.norm(together, axis=1)
    return norms


def _embeddings(out: torch.Tensor) -> Floats:
    values = to_numpy(out)
    if not np.isfinite(values).all():
        raise ValueError("embeddings must be finite, got NaN or infinity; check the weights and the precision")
    return values


def _least_cosine(a: Floats, b: Floats) -> float:
    products = np.einsum("ij,ij->i", a, b, dtype=np.float64)
    lengths = np.linalg.norm(a.astype(np.float64), axis=1) * np.linalg.norm(b.astype(np.float64), axis=1)
    return float((products / lengths).min())


def probe_images(models: LoadedModels, spec: ImageSpec | None, rows: Sequence[int]) -> torch.Tensor:
    """Images of 4 x 4 seeded colors as a model's pixels, [rows, 3, H, W]."""
    if spec is None:
        raise ValueError("it has no `image` (an ImageSpec), so it cannot encode images")
    colors = np.random.default_rng(0).integers(0, 256, (_IMAGES, 4, 4, 3), np.uint8)[list(rows)]
    y, x = np.arange(spec.height) * 4 // spec.height, np.arange(spec.width) * 4 // spec.width
    return to_pixels(models.accelerator.put(np.ascontiguousarray(colors[:, y][:, :, x])), spec)


def _failed(name: str, kind: str, model: Any, error: BaseException, batch: int | None) -> UserError:
    frames = user_frames(error)
    text = str(error) if isinstance(error, ValueError) and not frames else f"{type(error).__name__}: {error}{frames}"
    # Attributes that are networks with dropout or batch norm in training mode.
    networks = {name: value for name, value in vars(model).items() if isinstance(value, torch.nn.Module)}
    if isinstance(model, torch.nn.Module):
        networks |= dict(model.named_children())
    stochastic = (torch.nn.modules.dropout._DropoutNd, torch.nn.modules.batchnorm._NormBase)
    training = [
        name
        for name, network in networks.items()
        if any(part.training and isinstance(part, stochastic) for part in network.modules())
    ]
    hint = (
        f". Call `.eval()` on `{'`, `'.join(training)}`, which is in training mode." if training else memory_hint(error)
    )
    where = kind if batch is None else f"{kind}, a batch of {batch:,}"
    return UserError(f"{name} fails its self-test ({where}): {text}{hint}")
