"""The golden file of an exported folder: pictures and texts, and what an app must make of them."""

from __future__ import annotations

import base64
import io
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from reinforce.errors import UserError
from reinforce.shipping.checks import Agreement, agreement
from reinforce.shipping.targets.base import Run
from reinforce.storage import Storage
from teachers.preprocessing.fit import fit
from teachers.protocols import ImageSpec

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
