"""Small sets in the layouts in which the sets of a suite are published."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from reinforce.evaluation.registry import SuiteSet, select_sets
from tests.helpers.data import write_tar
from tests.helpers.evaluation import COLOURS, solid_image

#: Samples of a set: (class index, image, metadata or None).
Samples = Sequence[tuple[object, bytes, Sequence[int] | None]]


def find_set(key: str) -> SuiteSet:
    """The set of a key, of the last part of one, or of a name, in any suite."""
    sets = [one for suite in ("datacomp", "sugarcrepe", "long-captions") for one in select_sets(suite)]
    return next(one for one in sets if one.key.endswith(key) or one.name.lower() == key)


def colour_samples(each: int = 2) -> list[tuple[object, bytes, Sequence[int] | None]]:
    """Solid images of all colours with their class indices, without metadata."""
    return [(index, solid_image(colour, shade), None) for index, colour in enumerate(COLOURS) for shade in range(each)]


def write_classification(
    root: Path,
    key: str,
    samples: Samples,
    classes: Sequence[str] = tuple(COLOURS),
    templates: Sequence[str] = ("a photo of {c}.", "{c}"),
    shards: int = 2,
) -> Path:
    """Write a set with its samples in turn in ``shards`` tars -> its folder."""
    folder = root / find_set(key).folder
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(classes) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")
    (folder / "test" / "nshards.txt").write_text(f"{shards}\n")
    for shard in range(shards):
        members = []
        for number, (label, image, metadata) in list(enumerate(samples))[shard::shards]:
            members += [(f"s{number:07}.webp", image), (f"s{number:07}.cls", str(label).encode())]
            if metadata is not None:
                members.append((f"s{number:07}.npy", npy(np.array(metadata))))
        write_tar(folder / "test" / f"{shard}.tar", members)
    return folder


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write_table(root: Path, key: str, columns: dict[str, list[Any]]) -> Path:
    """Write a set as one Parquet file, where the branch refs/convert/parquet has it -> the file."""
    path = root / find_set(key).folder / "TEST" / "test" / "0000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table(columns), path)
    return path


def stored(image: bytes) -> dict[str, Any]:
    """An image as Hugging Face stores it in a table."""
    return {"bytes": image, "path": None}
