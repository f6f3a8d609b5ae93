"""View of a finished dataset: its files, all values of one sample, and the report of ``reinforce inspect``.

Files and values are read with pyarrow and numpy alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from reinforce.dataset.augment import Augmentation, from_records
from reinforce.errors import UserError
from reinforce.inspection.report import inspect
from reinforce.terminal import format_bytes


def show_dataset(dataset: str | Path, report: str | Path) -> None:
    """Print the dataset's files and its first sample, and write a report to a folder. Raises UserError."""
    root = Path(dataset)
    shards = [path for path in sorted((root / "samples").glob("*.parquet")) if pq.read_metadata(path).num_rows]
    if not shards:
        raise UserError(f"{root} has no samples. Run `reinforce run configs/demo.yaml` first.")
    print("\n".join(describe_files(root)), end="\n\n")
    print("\n".join(describe_sample(root, shards[0].name)), end="\n\n")
    print("\n".join(inspect(str(root), str(report)).lines()))


def describe_files(root: Path) -> list[str]:
    """Return one line for each folder with files: its size and content."""
    folders = sorted({path.parent for path in root.glob("[!.]*/**/*") if path.is_file()})
    lines = [f"{root}/  {format_bytes(_size(root))}"]
    entries = [root / "dataset.json", *folders] if (root / "dataset.json").exists() else folders
    for path in entries:
        name = path.name if path.is_file() else f"{path.relative_to(root)}/"
        lines.append(f"  {name:<34} {format_bytes(_size(path)):>10}  {_describe_folder(root, path)}")
    return lines


def describe_sample(root: Path, shard: str, row: int = 0) -> list[str]:
    """Return one line for each value that the dataset has for one row of a shard."""
    sample = _read_row(root / "samples" / shard, row)
    lines = [
        f"One sample: row {row} of {shard} in every layer",
        f"  {'key':<34} {sample['key']}",
        f"  {'caption':<34} {sample['caption']}",
        f"  {'image':<34} {sample['width']} x {sample['height']} pixels",
    ]
    for k, augmentation in enumerate(from_records(sample["augmentations"])):
        lines.append(f"  {f'augmentation {k}':<34} {_describe_augmentation(augmentation)}")
    for path in sorted((root / "captions").glob(f"*/{shard}")):
        for n, caption in enumerate(_read_row(path, row)["captions"] or []):
            lines.append(f"  {f'captions/{path.parent.name} {n}':<34} {caption!r}")
    for path in sorted((root / "embeddings").glob(f"*/*/{shard}")):
        vectors = _read_vectors(path, row)
        norm = np.linalg.norm(vectors.astype(np.float32), axis=1).mean()
        lines.append(
            f"  {path.parent.relative_to(root)!s:<34} {list(vectors.shape)} {vectors.dtype}, mean norm {norm:.3f}"
        )
    return lines


def _describe_folder(root: Path, path: Path) -> str:
    first, *rest = path.relative_to(root).parts
    if first == "dataset.json":
        return "the manifest: fingerprint and settings of each layer"
    if first == "samples":
        return "key, caption, image and augmentation records; defines rows and order"
    if first == "captions":
        return f"synthetic captions by {rest[0]}"
    if first == "embeddings":
        shard = next(path.glob("*.parquet"))
        shape = pq.read_schema(shard).field("embeddings").type.shape
        what = {"images": "the augmented images", "caption": "the true caption"}.get(rest[1], f"{rest[1]}'s captions")
        return f"embeddings of {what} by {rest[0]}, {shape} per sample"
    if first == "quarantine":
        return "samples that were refused, with the reason"
    return "config, events and timings of a run" if first == "runs" else ""


def _describe_augmentation(augmentation: Augmentation) -> str:
    crop = augmentation.crop
    ops = [f"{op.name} {op.magnitude:.3g}" if op.magnitude else op.name for op in augmentation.ops or ()]
    box = f"rows {crop.top} to {crop.top + crop.height}, columns {crop.left} to {crop.left + crop.width}"
    return f"{box}, resized to {augmentation.size} x {augmentation.size}" + "".join(f", {op}" for op in ops)


def _read_row(path: Path, row: int) -> dict[str, Any]:
    return dict(pq.read_table(path).slice(row, 1).to_pylist()[0])


def _read_vectors(path: Path, row: int) -> np.ndarray:
    """Return the embeddings of one row: [N, D]."""
    table = pq.read_table(path).slice(row, 1).combine_chunks()
    column: pa.FixedShapeTensorArray = table.column("embeddings").chunk(0)
    vectors: np.ndarray = column.to_numpy_ndarray()[0]
    if "scales" in table.column_names:
        vectors = vectors * table.column("scales").chunk(0).to_numpy_ndarray()[0][:, None]
    return vectors


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
