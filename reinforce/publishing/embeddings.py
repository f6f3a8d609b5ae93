"""``reinforce export embeddings``: the vectors of one teacher as clip-retrieval and autofaiss read them.

``img_emb/img_emb_0.npy`` and ``text_emb/text_emb_0.npy`` hold an image and a text vector [rows, dim] for each row of
``metadata/metadata_0.parquet``. There is one such part for each shard; its metadata is written last, so that the same
command resumes an export.
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from reinforce.dataset import vectors
from reinforce.dataset.kinds.samples import true_captions
from reinforce.dataset.layer_file import row_errors
from reinforce.dataset.layers import SAMPLES, TRUE_CAPTION, captions_layer, embeddings_layer
from reinforce.dataset.reading import Dataset
from reinforce.errors import UserError
from reinforce.processes.parallel import open_workers
from reinforce.publishing.shards import ExportSource, check_output, record_export
from reinforce.source.samples import parse_json
from reinforce.storage import Storage, as_seen_by_workers
from reinforce.terminal import plural
from schemas import TRUE_CAPTIONS
from teachers.redact import redact_values

CONFIG = "embeddings.json"
IMAGES, TEXTS, METADATA = "img_emb", "text_emb", "metadata"
AVERAGE = "average"
NO_TEXTS = "none"
_LEFT_OUT = b"reinforce.left_out"  # in the footer of metadata
_SCHEMA = pa.schema(
    [
        ("image_path", pa.string()),  # the key: clip-retrieval puts it here for tars
        ("caption", pa.string()),
        ("shard", pa.string()),
        ("url", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)
_COLUMNS = ("key", "caption", TRUE_CAPTIONS, "metadata", "width", "height")

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Choice:
    """Which vectors are exported.

    ``texts`` is ``caption``, a captioner, or ``none``. ``image`` and ``text`` are the number of the augmentation and of
    the caption, or ``average``: the mean of all of them, normalised.
    """

    teacher: str
    texts: str
    image: int | Literal["average"]
    text: int | Literal["average"]
    dtype: Literal["float16", "float32"]


@dataclass(frozen=True)
class PartExport:
    """The files to write for each shard. ``several`` is whether text vectors are means over several true captions."""

    source: ExportSource
    output: str
    choice: Choice
    several: bool


@dataclass
class ExportedVectors:
    """Result of an export: rows written, and rows without an image or text vector."""

    output: str
    choice: Choice
    parts: int = 0
    kept: int = 0
    rows: int = 0
    left_out: int = 0

    def lines(self) -> list[str]:
        texts = "" if self.choice.texts == NO_TEXTS else f", texts: {self.choice.texts} ({self.choice.text})"
        kept = f", of which {self.kept:,} were there before" if self.kept else ""
        lines = [
            f"{plural(self.rows, 'vector')} of {self.choice.teacher}, images: augmentation {self.choice.image}{texts}, "
            f"in {plural(self.parts, 'part')}{kept}: {self.output}"
        ]
        if self.left_out:
            lines.append(f"left out: {plural(self.left_out, 'sample')} without a vector or text")
        return [*lines, f"index them: autofaiss build_index --embeddings {self.output}/{IMAGES} --metric_type ip"]


def export_embeddings(
    url: str,
    output: str,
    *,
    teacher: str | None = None,
    texts: str = TRUE_CAPTION,
    image: int | Literal["average"] = AVERAGE,  # type: ignore[assignment]
    text: int | Literal["average"] = 0,
    dtype: Literal["float16", "float32"] = "float16",
    view: str | None = None,
    use_ray: bool = True,
    address: str | None = None,
) -> ExportedVectors:
    """Write the vectors of the complete shards of a dataset to a folder or fsspec URI. Raises UserError.

    Rows that lack a vector are left out and counted. ``teacher`` may be left open if the dataset has one. With
    ``view``, only the samples that it keeps are exported.
    """
    captioners = [] if texts in (TRUE_CAPTION, NO_TEXTS) else [texts]
    models = {"teachers": None if teacher is None else [teacher], "captioners": captioners}
    data = Dataset(url, models, view=view)
    if len(data.teachers) != 1:
        raise UserError(f"{data.store.url} has teachers {', '.join(data.teachers)}: choose one by --teacher.")
    [teacher] = data.teachers
    choice = Choice(teacher, texts, image, text, dtype)
    count = data.manifest["layers"].get(embeddings_layer(teacher, TRUE_CAPTION), {}).get("count", 1)
    several = texts == TRUE_CAPTION and text == AVERAGE and count > 1
    wanted: list[tuple[str, int | str, str]] = [(embeddings_layer(teacher, "images"), image, "--image")]
    if texts != NO_TEXTS:
        wanted.append((embeddings_layer(teacher, texts), text, "--text"))
    for name, number, option in wanted:
        if name not in data.layers:
            raise UserError(f"{data.store.url} has no {name}. Choose by --teacher and --texts.")
        vectors_of_row = data.manifest["layers"][name]["count"]
        if isinstance(number, int) and not 0 <= number < vectors_of_row:
            raise UserError(f"{option}: {name} has vectors 0 to {vectors_of_row - 1}, not {number}.")
    needed = [SAMPLES, *map(captions_layer, data.captioners), *(name for name, _, _ in wanted)]
    source = ExportSource.of(data, url, needed)
    return _write(PartExport(source, as_seen_by_workers(output), choice, several), data.shards, use_ray, address)


def _write(export: PartExport, shards: Sequence[str], use_ray: bool, address: str | None) -> ExportedVectors:
    output = Storage(export.output)
    check_output(Storage(export.source.url), output)
    result = ExportedVectors(output.url, export.choice)
    with output.lock():
        config = {
            **asdict(export.choice),
            "layers": dict(export.source.fingerprints),
            "shards": len(shards),
            "shard_names": hashlib.sha256("\n".join(shards).encode()).hexdigest()[:16],
            **({} if export.source.view is None else {"view": asdict(export.source.view)}),
            **({"each_caption": "once"} if export.several else {}),
        }
        record_export(output, config, CONFIG)
        digits = len(str(max(len(shards) - 1, 0)))
        parts = [(f"{number:0{digits}d}", shard) for number, shard in enumerate(shards)]
        written, missing, counts = {*output.names(METADATA)}, [], []  # rows, and rows that were left out
        for part in parts:
            name = f"{METADATA}_{part[0]}.parquet"
            if name not in written:
                missing.append(part)
                continue
            with output.storage_errors("read", METADATA), output.fs.open(output.path(METADATA, name), "rb") as file:
                footer = pq.read_metadata(file)
            counts.append((footer.num_rows, int((footer.metadata or {}).get(_LEFT_OUT, b"0"))))
        result.parts, result.kept = len(parts), len(parts) - len(missing)
        with open_workers(address, use_ray) as workers:
            export_one = functools.partial(export_part, export)
            counts += [count for _, count in workers.map(export_one, missing, unit="shard", name=" ".join)]
    result.rows, result.left_out = (sum(numbers) for numbers in zip(*counts, strict=True))
    return result


def export_part(export: PartExport, part: tuple[str, str]) -> tuple[int, int]:
    """Write the files of a part, its number and shard -> rows that were written, and rows that were left out."""
    number, shard = part
    choice, output = export.choice, Storage(export.output)
    images, texts, rows, left_out = list[Floats](), list[Floats](), list[dict[str, Any]](), 0
    with export.source.open(shard, _COLUMNS) as layers:
        for tables in map(layers.read, range(layers.row_groups)):
            with row_errors(layers.store.url):
                image, text, captions = _vectors(tables, choice)
                keep = np.asarray(~np.isnan(image).any(axis=1))
                if choice.texts != NO_TEXTS:
                    has_text = np.array([caption is not None for caption in captions], bool)
                    keep &= ~np.isnan(text).any(axis=1) & has_text
                images.append(image[keep])
                texts.append(text[keep])
                samples = tables[SAMPLES].to_pylist()
                for row in np.flatnonzero(keep).tolist():
                    document = parse_json((samples[row]["metadata"] or "{}").encode())
                    url = document.get("url") if isinstance(document, dict) else None
                    rows.append(
                        {
                            "image_path": samples[row]["key"],
                            "caption": captions[row],
                            "shard": shard,
                            "url": redact_values(url) if isinstance(url, str) else None,
                            "width": samples[row]["width"],
                            "height": samples[row]["height"],
                        }
                    )
                left_out += len(keep) - int(keep.sum())
    for folder, arrays in ((IMAGES, images), (TEXTS, texts)):
        if folder == IMAGES or choice.texts != NO_TEXTS:
            out = io.BytesIO()
            np.save(out, np.concatenate(arrays).astype(choice.dtype))
            output.write_bytes(out.getvalue(), folder, f"{folder}_{number}.npy")
    table = pa.Table.from_pylist(rows, schema=_SCHEMA.with_metadata({_LEFT_OUT: str(left_out)}))
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    output.write_bytes(buffer.getvalue().to_pybytes(), METADATA, f"{METADATA}_{number}.parquet")
    return len(rows), left_out


def _vectors(tables: Mapping[str, pa.Table], choice: Choice) -> tuple[Floats, Floats, list[str | None]]:
    """Image vectors and text vectors [rows, dim] of a row group, and the captions of the latter; null rows are NaN."""
    at = choice.text if isinstance(choice.text, int) else 0
    texts_of = true_captions(tables[SAMPLES])  # which come again in turn where they are fewer than the vectors
    captions: list[str | None] = [texts[at % len(texts)] if texts else None for texts in texts_of]
    image = _select(tables[embeddings_layer(choice.teacher, "images")], choice.image)
    if choice.texts == NO_TEXTS:
        return image, np.empty((len(image), 0), np.float32), captions
    if choice.texts != TRUE_CAPTION:
        listed = tables[captions_layer(choice.texts)]["captions"].to_pylist()
        captions = [None if texts is None or len(texts) <= at else texts[at] for texts in listed]
    own = tables[SAMPLES] if choice.texts == TRUE_CAPTION else None
    return image, _select(tables[embeddings_layer(choice.teacher, choice.texts)], choice.text, own), captions


def _select(table: pa.Table, number: int | str, samples: pa.Table | None = None) -> Floats:
    """Vector ``number`` of each row, or the mean of all, as unit vectors [rows, dim].

    With ``samples``, the vectors are of their true captions, each of which counts once.
    """
    stored = vectors.decode(table)
    own = None if samples is None else vectors.own_slots(samples, stored.shape[1])
    if number == AVERAGE and own is not None and not own.all():
        stored = np.where(own[:, :, None], stored, 0)  # the sum has the direction of the mean
    chosen: Floats = stored.mean(axis=1) if number == AVERAGE else stored[:, int(number)]
    norms = np.linalg.norm(chosen, axis=1, keepdims=True)
    return np.divide(chosen, np.where(norms > 0, norms, 1), dtype=np.float32)
