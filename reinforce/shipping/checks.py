"""Comparison of an exported model with the trained one that it was made of."""

from __future__ import annotations

import base64
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from reinforce.errors import UserError
from reinforce.evaluation.evaluator import Evaluator
from reinforce.shipping.targets.base import Run
from reinforce.storage import Storage
from teachers.fit import fit
from teachers.protocols import ImageSpec
from teachers.runtime.accelerator import Accelerator

#: Texts that are compared, beside those of the tokenizer, where there is no evaluation.
HELD_OUT = tuple(
    f"a {kind} of a {thing} {place}"
    for thing in ("small dog", "red bus", "wooden chair", "man with an umbrella")
    for kind in ("photo", "drawing", "blurry picture")
    for place in ("on a beach", "at night", "in the snow", "in front of a window")
)
_BATCHES = (1, 3, 8)


@dataclass(frozen=True)
class Agreement:
    """Cosines of the embeddings of ``count`` inputs by two models, and the largest difference of an element."""

    minimum: float
    mean: float
    difference: float
    count: int

    def as_json(self) -> dict[str, Any]:
        return {
            "cosine": {"min": self.minimum, "mean": self.mean, "inputs": self.count},
            "largest_difference": self.difference,
        }


def agreement(actual: torch.Tensor, expected: torch.Tensor) -> Agreement:
    """Compare embeddings [N, dim]. Numbers that are not finite, or another shape, count as infinitely different."""
    if actual.shape != expected.shape or not bool(actual.isfinite().all() and expected.isfinite().all()):
        return Agreement(float("nan"), float("nan"), float("inf"), len(expected))
    cosines = cosine_similarity(actual.double(), expected.double())
    difference = float((actual - expected).abs().max())
    return Agreement(float(cosines.min()), float(cosines.mean()), difference, len(expected))


def compare(run: Run, reference: Run, inputs: torch.Tensor) -> Agreement:
    """Compare what two models make of the same inputs, in batches of several sizes."""
    with torch.inference_mode():
        actual, expected = (torch.cat([model(batch) for batch in _batches(inputs)]) for model in (run, reference))
    return agreement(actual, expected)


def _batches(inputs: torch.Tensor) -> Iterator[torch.Tensor]:
    start = 0
    for size in (*_BATCHES, *[_BATCHES[-1]] * len(inputs)):
        if start < len(inputs):
            yield inputs[start : start + size]
        start += size


class _RecordingEncoder:
    """An exported model as an evaluation calls it, which keeps all embeddings so that they can be compared."""

    def __init__(
        self, runs: Mapping[str, Run], image: ImageSpec, tokenize: Callable[[Sequence[str]], Any] | None
    ) -> None:
        #: Pixels between 0 and 255, which the exported graphs normalize.
        self.image: ImageSpec | None = replace(image, mean=(0.0,) * 3, std=(1 / 255,) * 3)
        self._runs, self._tokenize = runs, tokenize
        self.kept: dict[str, list[torch.Tensor]] = {"image": [], "text": []}

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._run("image", pixels.round().byte().permute(0, 2, 3, 1).contiguous())

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        if self._tokenize is None:
            raise UserError("it has no text tower: compare it on sets of `probes`, with --config.")
        return self._run("text", self._tokenize(texts))

    def _run(self, side: str, inputs: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            vectors = self._runs[side](inputs)
        self.kept[side].append(vectors)
        return vectors


def compare_on_sets(
    evaluator: Evaluator,
    models: Mapping[str, Mapping[str, Run]],
    image: ImageSpec,
    tokenize: Callable[[Sequence[str]], Any] | None,
) -> tuple[dict[str, Agreement], dict[str, dict[str, float]]]:
    """Evaluate two models, by name and side, the trained one first; compare all their embeddings.

    Returns the agreement by side, and the metrics by model.
    """
    encoders = {name: _RecordingEncoder(runs, image, tokenize) for name, runs in models.items()}
    metrics = {name: evaluator.evaluate(one, Accelerator("cpu", "fp32")).metrics for name, one in encoders.items()}
    # All embeddings [N, dim] of a model by side; sides that were not used are left out.
    expected, actual = (
        {side: torch.cat(kept) for side, kept in encoder.kept.items() if kept} for encoder in encoders.values()
    )
    return {side: agreement(actual[side], expected[side]) for side in expected}, metrics


#: The golden file of an exported folder: pictures and texts, and what an app must make of them.
GOLDEN = "golden.json"
_SIZES = ((320, 240), (200, 310), (96, 96))  # width, height: both orientations, and a picture to enlarge
_TEXTS = 8
_BYTES = 64 * 2**20


def write_golden(
    path: Path,
    references: Mapping[str, Run],
    image: ImageSpec,
    texts: Mapping[str, list[int]],
) -> None:
    """Write pictures and texts with what an app must make of them: pixels, tokens and the embeddings in fp32.

    ``references`` are the towers of the trained model by side, ``texts`` tokens by text. A picture is a PNG in base64,
    as it is and resized.
    """
    pictures = [Image.fromarray(_scene(*size, seed)) for seed, size in enumerate(_SIZES)]
    resized = np.stack([fit(picture, image) for picture in pictures])
    chosen = dict(itertools.islice(texts.items(), _TEXTS))
    with torch.inference_mode():
        of_pictures = _rounded(references["image"](torch.from_numpy(resized)))
        of_texts = _rounded(references["text"](torch.tensor([*chosen.values()]))) if chosen else []
    content = {
        "pictures": [
            {"png": _png(picture), "resized_png": _png(Image.fromarray(pixels)), "embedding": embedding}
            for picture, pixels, embedding in zip(pictures, resized, of_pictures, strict=True)
        ],
        "texts": [
            {"text": text, "tokens": ids, "embedding": embedding}
            for (text, ids), embedding in zip(chosen.items(), of_texts, strict=True)
        ],
    }
    path.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def check_golden(folder: str, target: str, load: Callable[[Path], Run]) -> dict[str, Agreement]:
    """Run the golden file of an exported folder on this machine; ``load`` loads a file. Raises UserError."""
    store = Storage(folder)
    about = store.read_json("export.json") if store.local else None
    if about is None or about.get("target") != target:
        raise UserError(
            f"{store.url} has no export.json of {target}: --check takes a local folder that "
            f"`reinforce export {target}` wrote."
        )
    golden = store.read_parsed(json.loads, GOLDEN, limit=_BYTES)
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one["resized_png"])))) for one in golden["pictures"]]
    inputs = {
        "image": (torch.from_numpy(np.stack(pictures)), golden["pictures"]),
        "text": (torch.tensor([one["tokens"] for one in golden["texts"]]), golden["texts"]),
    }
    found = {}
    for side in about["towers"]:
        rows, cases = inputs[side]
        run = load(Path(store.root, about["towers"][side]["file"]))
        expected = torch.tensor([case["embedding"] for case in cases])
        with torch.inference_mode():
            found[side] = agreement(torch.cat([run(row) for row in rows.split(1)]), expected)
    return found


def _scene(width: int, height: int, seed: int) -> np.ndarray:
    """A picture with soft colours and sharp edges, uint8 [height, width, 3]."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8))
    pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
    for _ in range(4):
        left, top = random.integers(0, width - 20), random.integers(0, height - 20)
        pixels[top : top + height // 4, left : left + width // 4] = random.integers(0, 256, 3)
    return pixels


def _rounded(embeddings: torch.Tensor) -> list[list[float]]:
    return [[round(value, 7) for value in row] for row in embeddings.tolist()]


def _png(picture: Image.Image) -> str:
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()
