"""Stand-ins for what is downloaded: images of img2dataset, labels of DFNDR, sets of the suite, a student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.data import write_tar
from tests.helpers.evaluation import COLOURS, encode_png, find_set, write_classification, write_table
from tests.helpers.published import npz
from tests.helpers.students import student_folder

CAPTIONS, AUGMENTATIONS, DIM, SIDE = 5, 3, 768, 48
#: Sets of every kind of metric: all with groups, those of WILDS, and WinoGAViL.
CLASSIFICATION = (
    *("cifar10", "vtab/pets", "fairness/geode", "fairness/dollar_street"),
    *("wilds/iwildcam", "wilds/camelyon17", "wilds/fmow"),
)
TABLES = ("retrieval/flickr_1k_test_image_text_retrieval", "misc/winogavil")


def write_stand_ins(folder: Path, samples: int) -> None:
    """Write ``samples`` images with labels, sets of evaluation, and the config of a student, below ``folder``."""
    numbers = range(samples)
    write_tar(folder / "images" / "00000000.tar", [member for number in numbers for member in _image(number)])
    write_tar(folder / "labels" / "00000000.tar", [member for number in numbers for member in _labels(number)])
    for key in CLASSIFICATION:
        fields = len(find_set(key).fields)
        tests = [
            (number % len(COLOURS), _noisy(number), (number % 2,) * fields if fields else None)
            for number in range(samples, samples + 24)
        ]
        write_classification(folder / "evalsets", key, tests)
    pairs = range(samples, samples + 12)
    columns = {
        "image": [{"bytes": _noisy(number), "path": None} for number in pairs],
        "caption": [[f"a {_colour(number)} thing {n}" for n in range(5)] for number in pairs],
    }
    flickr, winogavil = TABLES
    write_table(folder / "evalsets", flickr, columns)
    write_table(folder / "evalsets", winogavil, _associations(range(samples, samples + 4)))
    student_folder(folder / "student")


def _associations(instances: range) -> dict[str, list[Any]]:
    """Instances of WinoGAViL with twelve candidates: all of the cue's colour are associated with it."""
    columns: dict[str, list[Any]] = {"cue": [], "candidate_images": [], "candidates": [], "associations": []}
    for number in instances:
        candidates = range(12 * number, 12 * number + 12)
        columns["cue"].append(f"{_colour(number)} thing")
        columns["candidate_images"].append([{"bytes": _noisy(one), "path": None} for one in candidates])
        columns["candidates"].append([str(one) for one in candidates])
        columns["associations"].append([str(one) for one in candidates if _colour(one) == _colour(number)])
    return columns


def _colour(number: int) -> str:
    return [*COLOURS][number % len(COLOURS)]


def _noisy(number: int) -> bytes:
    """A picture of one colour with noise."""
    noise = np.random.default_rng(number).normal(0, 30, (SIDE, SIDE, 3))
    return encode_png(np.clip(np.array(COLOURS[_colour(number)]) + noise, 0, 255).astype(np.uint8))


def _url(number: int) -> str:
    return f"https://example.org/{number}.png"


def _image(number: int) -> list[tuple[str, bytes]]:
    """The members of an image as img2dataset writes them; its key is another one than that of the labels."""
    key, caption = f"{number:09d}", f"a photo of something {_colour(number)}"
    metadata = {"url": _url(number), "caption": caption, "key": key}
    return [
        (f"{key}.png", _noisy(number)),
        (f"{key}.txt", caption.encode()),
        (f"{key}.json", json.dumps(metadata).encode()),
    ]


def _labels(number: int) -> list[tuple[str, bytes]]:
    """The members of a sample of DFNDR: two teachers that know the colours, end to end."""
    rng = np.random.default_rng(number)
    records = []
    for _ in range(AUGMENTATIONS):
        side = int(rng.integers(SIDE // 3, SIDE + 1))
        records.append([[*map(int, rng.integers(0, SIDE - side + 1, 2)), side, side], None])
    known = np.zeros((1, 2 * DIM), np.float32)
    known[0, [number % len(COLOURS), DIM + number % len(COLOURS)]] = 1
    vectors = {
        "image_emb": known.repeat(AUGMENTATIONS, 0),
        "text_emb": known,
        "syn_text_dfn_mscoco38k_emb": known.repeat(CAPTIONS, 0),
    }
    captions = {"syn_text_dfn_mscoco38k": [f"a {_colour(number)} picture {n}" for n in range(CAPTIONS)]}
    key = f"dfn{number:07d}"
    return [
        (f"{key}.url.txt", _url(number).encode()),
        (f"{key}.syn.json", json.dumps(captions).encode()),
        (f"{key}.paug.json", json.dumps({"param_aug": json.dumps(records)}).encode()),
        (f"{key}.npz", npz(vectors)),
    ]
