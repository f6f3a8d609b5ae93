"""``reinforce export datacompdr``: a dataset as tars in the format of DataCompDR, one a shard.

The trainer of ml-mobileclip (open_clip with ``training/open_clip_v2.patch``) reads the tars and ``config.json`` as they
are, and ``reinforce run`` reads them as ``reinforcements``. What the format cannot hold is refused before anything is
written. Tars that exist are kept, so that the same command resumes an export.

A sample has the members ``KEY.png`` (or another image extension), ``txt``, ``url.txt``, ``syn.json``, ``paug.json``,
``npz`` or ``pth.gz``, and ``json``, in this order. ``reinforce.labels.members`` reads them. Equal layers give
equal bytes.
"""

from __future__ import annotations

import functools
import gzip
import io
import json
import re
import shlex
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from reinforce.dataset import vectors
from reinforce.dataset.kinds.samples import PUBLISHED_FORMAT
from reinforce.dataset.layer_file import row_errors
from reinforce.dataset.layers import (
    NO_IMAGES,
    SAMPLES,
    TRUE_CAPTION,
    captions_layer,
    embeddings_layer,
    mapping_at,
)
from reinforce.dataset.reading import Dataset
from reinforce.dataset.sample import ImagePolicies
from reinforce.dataset.store import Store
from reinforce.errors import UserError
from reinforce.images.backends import FIXED_POINT_BACKEND
from reinforce.images.policy import IMAGE_POLICY, PUBLISHED_POLICY, ImageRefused, decode, format_extension, is_plain
from reinforce.images.records import AUGMENTATION_BACKEND, OPS
from reinforce.labels.members import CAPTIONS, MAX_OPS, PARAMETERS
from reinforce.processes.parallel import open_workers
from reinforce.publishing.shards import ExportSource, check_output, public_url, record_export, without_paths
from reinforce.source.config import Limits
from reinforce.source.formats.tar import split_name
from reinforce.source.references import referenced_images
from reinforce.source.samples import parse_json
from reinforce.storage import Storage, as_seen_by_workers
from reinforce.terminal import escape, plural
from schemas import IMAGE_DIGEST, image_columns
from teachers.redact import redact_values

#: Name of a captioner's list in ``syn.json``; its vectors are in the array of that name and ``_emb``.
LIST_OF = "syn_text_{}"
_FASTEST = 1  # of zlib's levels
_ENTRY_SECONDS = 0  # modification time of members
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\]")
_NAMED_KEYS = 100  # of samples that are left out, per shard
_READ_EXTENSIONS = ("jpg", "png", "webp")  # by the trainer of ml-mobileclip

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ShardExport:
    """The files to write to the folder ``output`` for each shard of a dataset, by its config and dataset.json.

    The order of ``teachers`` and ``captioners`` is that of dimensions and lists. ``operations`` is the number of each
    record with RandAugment. Of an image, layout ``dfndr`` has no member that states more than its URL.
    """

    source: ExportSource
    output: str
    teachers: tuple[str, ...]
    captioners: tuple[str, ...]
    images: Literal["embed", "reference", "none"]
    with_images: bool
    image_policy: str
    operations: int
    precision: Literal["fp32", "bf16"]
    limits: Limits
    layout: Literal["datacompdr", "dfndr"]

    @property
    def reads_images(self) -> bool:
        """Whether images are read: to be written, or to compare image policies."""
        return self.with_images or (self.images == "embed" and self.image_policy != PUBLISHED_POLICY)


class LeftOut(Exception):
    """A sample that the format cannot hold; the message is the reason."""


def export_shard(export: ShardExport, shard: str) -> dict[str, Any]:
    """Write the tar of a shard, and before it its ``_stats.json``, which is returned.

    Raises UserError for damaged layers and for a record with an operation that the format does not have.
    """
    output = Storage(export.output)
    left_out: dict[str, list[str]] = {}
    samples, converted, keys = 0, 0, set[str]()
    with output.new_file(f"{shard}.tar") as path:
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            for key, row in _rows(export, shard):
                try:
                    name = _member_name(key, keys)
                    with row_errors(Store(export.source.url).url):
                        members = list(_members(export, shard, key, row))
                        image, is_converted = _image_members(export, row["image"])
                except LeftOut as reason:
                    left_out.setdefault(str(reason), []).append(key)
                    continue
                for extension, content in [*image, *members]:
                    entry = tarfile.TarInfo(f"{name}.{extension}")
                    entry.size, entry.mtime = len(content), _ENTRY_SECONDS
                    tar.addfile(entry, io.BytesIO(content))
                samples += 1
                converted += is_converted
        stats = {
            "samples": samples,
            "converted_images": converted,
            "left_out": {
                reason: {"samples": len(found), "keys": found[:_NAMED_KEYS]} for reason, found in left_out.items()
            },
        }
        output.write_json(stats, f"{shard}_stats.json")
    return stats


def _rows(export: ShardExport, shard: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key and values of each row: columns of samples, ``captions`` by captioner, and arrays with NaN where null."""
    columns = ["key", "caption", "metadata", "augmentations"]
    columns += image_columns(export.images) if export.reads_images else ()
    columns += ("uid", "sha256", "url") if export.images == NO_IMAGES else ()
    with export.source.open(shard, columns) as opened:
        for number in range(opened.row_groups):
            tables = opened.read(number)
            with row_errors(opened.store.url):
                rows = tables[SAMPLES].to_pylist()
                arrays: dict[str, Floats] = {}  # [rows, vectors, dimensions of all teachers]
                for inputs in ("images", TRUE_CAPTION, *export.captioners):
                    layers = [embeddings_layer(teacher, inputs) for teacher in export.teachers]
                    array = np.concatenate([vectors.decode(tables[layer]) for layer in layers], axis=2)
                    own = {"images": "image_emb", TRUE_CAPTION: "text_emb"}
                    arrays[own.get(inputs, f"{LIST_OF.format(inputs)}_emb")] = array
                arrays["text_emb"] = arrays["text_emb"][:, :1]
                captions = {c: tables[captions_layer(c)]["captions"].to_pylist() for c in export.captioners}
            images: Iterator[bytes | None] = iter([None] * len(rows))
            if export.reads_images and export.images == "embed":
                images = iter([row["image"] for row in rows])
            elif export.reads_images:
                digests = [row[IMAGE_DIGEST] for row in rows]
                images = referenced_images([row["image_ref"] for row in rows], export.source.roots, digests=digests)
            for index, row in enumerate(rows):
                values = {name: array[index] for name, array in arrays.items()}
                texts = {name: listed[index] for name, listed in captions.items()}
                yield row["key"], {**row, "image": next(images), "captions": texts, "arrays": values}


def _image_members(export: ShardExport, image: bytes | None) -> tuple[list[tuple[str, bytes]], bool]:
    """Extension and content of the image if it is written, and whether it was converted. Raises LeftOut.

    It is converted to a PNG of its pixels where readers would decode it to others, or do not read its format.
    """
    if image is None:
        return [], False
    policy, limits = export.image_policy, export.limits
    try:
        if not export.with_images:
            if _has_published_pixels(image, policy, limits):
                return [], False
        elif (own := format_extension(image)) in _READ_EXTENSIONS and _has_published_pixels(image, policy, limits):
            return [(own, image)], False
        else:
            out = io.BytesIO()
            decode(image, limits, policy=policy).save(out, "PNG")
            return [("png", out.getvalue())], True
    except ImageRefused as error:
        raise LeftOut(f"its image cannot be decoded: {error.reason.value}") from error
    raise LeftOut(
        f"image policy {policy} gives other pixels than {PUBLISHED_POLICY}, by which readers of the format decode the "
        "original: orientation, transparency or more than 8 bits"
    )


def _has_published_pixels(image: bytes, policy: str, limits: Limits) -> bool:
    """Whether readers of the format decode an image to the pixels that ``policy`` gives. Raises ImageRefused."""
    if policy == PUBLISHED_POLICY or is_plain(image):
        return True
    one, other = (decode(image, limits, policy=each) for each in (policy, PUBLISHED_POLICY))
    return one.size == other.size and one.tobytes() == other.tobytes()


def _members(export: ShardExport, shard: str, key: str, row: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Extension and content of the members of a sample beside its image. Raises LeftOut."""
    caption, arrays = row["caption"], dict(row["arrays"])
    if caption is None:
        del arrays["text_emb"]
    missing = [name for name, array in arrays.items() if np.isnan(array).any()]
    missing += [LIST_OF.format(name) for name, texts in row["captions"].items() if texts is None or None in texts]
    if missing:
        raise LeftOut(f"null in the dataset: {', '.join(missing)}")
    found = parse_json((row["metadata"] or "{}").encode())
    # Published labels have no metadata, but what is stated of the image.
    stated = {kind: row[kind] for kind in ("uid", "sha256", "url") if row.get(kind) is not None}
    metadata = {**(found if isinstance(found, dict) else {}), **stated}
    url = metadata.get("url")
    if export.layout == "dfndr" and (not isinstance(url, str) or (url := public_url(url)) is None):
        raise LeftOut("it has no URL that is public, which is all that this layout states of an image")
    if export.layout == "datacompdr":
        metadata = redact_values(metadata)
        url = metadata.get("url")
    if caption is not None and export.layout == "datacompdr":
        yield "txt", caption.encode()
    if isinstance(url, str):
        yield "url.txt", url.encode(errors="replace")
    yield CAPTIONS, _json({LIST_OF.format(name): texts for name, texts in row["captions"].items()})
    yield PARAMETERS, _json({"param_aug": [_record(export, shard, key, one) for one in row["augmentations"]]})
    yield ("npz", _npz(arrays)) if export.precision == "fp32" else ("pth.gz", _pth(arrays))
    uid = metadata.get("uid")
    if export.layout == "datacompdr":
        yield "json", _json({**metadata, "uid": uid if isinstance(uid, str) else key})


def _record(export: ShardExport, shard: str, key: str, record: Mapping[str, Any]) -> list[Any]:
    """``[[top, left, height, width], [[index of the operation, magnitude], ...] or null]``."""
    crop, ops = record["crop"], record["ops"]
    box = [crop[side] for side in ("top", "left", "height", "width")]
    if ops is None:
        return [box, None]
    unknown = next((op["name"] for op in ops if op["name"] not in OPS), None)
    if unknown is not None or len(ops) != export.operations:
        what = f"{len(ops)} operations in one record, where others have {export.operations}"
        if unknown is not None:
            what = f"operation {unknown[:100]!r}; it has {', '.join(OPS)}"
        where = f"{Store(export.source.url).url}, shard {shard}, key {escape(key[:200])}"
        raise UserError(f"{where}: the format has no {escape(what)}.")
    return [box, [[OPS.index(op["name"]), op["magnitude"]] for op in ops]]


def _member_name(key: str, taken: set[str]) -> str:
    """A key as the name of members, with %XX for what ends a key or leads out of a folder. Raises LeftOut."""
    *folders, base = key.split("/")
    parts = [re.sub(r"^\.+$", _percent, folder) for folder in folders] + [re.sub(r"\.", _percent, base)]
    name = _UNSAFE.sub(_percent, "/".join(parts))
    if split_name(f"{name}.json") != (name, "json") or name.startswith("/"):
        raise LeftOut("its key cannot name a member of a tar")
    if name in taken:
        raise LeftOut("another key of the shard has the same name in a tar")
    taken.add(name)
    return name


def _percent(found: re.Match[str]) -> str:
    return "".join(f"%{ord(letter):02X}" for letter in found[0])


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def _npz(arrays: Mapping[str, Floats]) -> bytes:
    """As ``np.savez_compressed``, for a sixth of its CPU and 5 % more bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=_FASTEST) as file:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, array, allow_pickle=False)
            file.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue(), zipfile.ZIP_DEFLATED, _FASTEST)
    return out.getvalue()


def _pth(arrays: Mapping[str, Floats]) -> bytes:
    """bfloat16 tensors, saved by torch and compressed, as published."""
    import torch

    out = io.BytesIO()
    torch.save({name: torch.from_numpy(np.array(array)).bfloat16() for name, array in arrays.items()}, out)
    return gzip.compress(out.getvalue(), _FASTEST, mtime=0)


CONFIG = "config.json"
#: Images from which the format's readers replace the normalisation by that of the student; the key must be there.
_NORMALIZE = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
_PUBLISHED_OPS = 2  # of published records, whose datasets record no number


@dataclass
class Exported:
    """Result of an export: samples, those whose images were converted, those left out by reason, and notes."""

    output: str
    config: Mapping[str, Any]
    shards: int = 0
    kept: int = 0
    samples: int = 0
    converted: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        kept = f", of which {self.kept:,} were there before" if self.kept else ""
        lines = [f"{plural(self.shards, 'tar')} with {plural(self.samples, 'sample')}{kept}: {self.output}"]
        if self.converted:
            lines.append(f"converted: {plural(self.converted, 'image')}, to PNGs that decode to the same pixels")
        lines += [f"left out: {plural(count, 'sample')}, {reason}" for reason, count in self.left_out.most_common()]
        teachers = self.config["reinforced_dataset"]["teachers"]
        flags = ["--dataset-reinforcement", "--dataset-reinforcement-config", f"{self.output}/{CONFIG}"]
        flags += ["--distill-teacher-dimension", *(str(teacher["dim"]) for teacher in teachers)]
        if all(teacher["logit_scale"] for teacher in teachers):
            flags += ["--distill-logit-scale", *(f"{teacher['logit_scale']:g}" for teacher in teachers)]
        # The weights are those of CLIP's loss and the distillation; else both count 1.
        flags += ["--distill-loss-weights", "0.0", "1.0", "--distill-average-after-softmax"]
        return [*lines, *self.notes, f"train with ml-mobileclip: {shlex.join(flags)}"]


def export_datacompdr(
    url: str,
    output: str,
    *,
    teachers: Sequence[str] | None = None,
    captioners: Sequence[str] | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    images: bool = True,
    images_from: Sequence[str] = (),
    approximate: bool = False,
    layout: Literal["datacompdr", "dfndr"] = "datacompdr",
    view: str | None = None,
    use_ray: bool = True,
    address: str | None = None,
) -> Exported:
    """Write the complete shards of a dataset to a folder or fsspec URI.

    The vectors of ``teachers`` are concatenated in this order; default: all. Without ``images`` the tars have none.
    ``images_from`` is that of ``reinforce.open``. ``approximate`` also accepts an augmentation backend whose pixels
    readers of the format replay only approximately. With ``view``, only the samples that it keeps are exported.
    ``layout`` ``dfndr`` is that of DFNDR: without images, true captions and all that states an image but its URL.
    Raises UserError, for what the format cannot hold before anything is written.
    """
    models = {"teachers": teachers, "captioners": captioners}
    data = Dataset(url, models, view=view, images_from=images_from, images_key="--images-from {}")
    images = images and layout == "datacompdr"
    if images and data.manifest["images"] == NO_IMAGES:
        raise UserError(f"{data.store.url} has labels without images. Add --no-images.")
    result = Exported(Storage(output).url, {})
    if not data.teachers:
        raise UserError("--teachers: name at least one teacher.")
    for teacher in data.teachers:
        needed = [embeddings_layer(teacher, inputs) for inputs in ("images", TRUE_CAPTION, *data.captioners)]
        if missing := [layer for layer in needed if layer not in data.layers]:
            raise UserError(
                f"{data.store.url} has no {', '.join(missing)}, and the format holds vectors of all teachers for "
                "images and all texts. "
                + (
                    "`reinforce export labels` publishes datasets without vectors of true captions."
                    if embeddings_layer(teacher, TRUE_CAPTION) in missing
                    else "Choose teachers and captioners by --teachers and --captioners."
                )
            )
    operations = _check_policies(data, approximate)
    result.config = build_config(data, operations, precision, images)
    if layout != "datacompdr":
        result.config["reinforced_dataset"]["layout"] = layout
    policies = data.manifest["policies"]
    limits = ImagePolicies.from_manifest(data.manifest, data.store.url).limits
    export = ShardExport(
        source=ExportSource.of(data, url, data.layers),
        output=as_seen_by_workers(output),
        teachers=tuple(data.teachers),
        captioners=tuple(data.captioners),
        images=data.manifest["images"],
        with_images=images,
        image_policy=policies["image"],
        operations=operations,
        precision=precision,
        limits=limits,
        layout=layout,
    )
    if layout == "datacompdr" and mapping_at(data.manifest, "layers", SAMPLES).get("count", 1) > 1:
        result.notes.append("of several true captions of a sample, the format has the first alone, and its vectors")
    if not data.captioners:
        result.notes.append("no captioner: the trainer of ml-mobileclip needs synthetic captions")
    if not export.reads_images and policies["image"] != PUBLISHED_POLICY:
        result.notes.append(
            f"images were not read: readers of the format decode by {PUBLISHED_POLICY}, the dataset by "
            f"{policies['image']}, which differs for images with orientation, transparency or more than 8 bits"
        )
    _write(export, data.shards, result, use_ray, address)
    return result


def _write(export: ShardExport, shards: Sequence[str], result: Exported, use_ray: bool, address: str | None) -> None:
    output = Storage(export.output)
    check_output(Storage(export.source.url), output)
    with output.lock():
        record_export(output, result.config, CONFIG, "reinforced_dataset")
        written = {*output.names()}
        missing = [shard for shard in shards if f"{shard}.tar" not in written]
        done = [shard for shard in shards if f"{shard}.tar" in written]
        found = {shard: output.read_json(f"{shard}_stats.json") or {} for shard in done}
        result.kept = len(found)
        with open_workers(address, use_ray) as workers:
            found |= workers.map(functools.partial(export_shard, export), missing, unit="shard")
    result.shards = len(found)
    for stats in found.values():
        result.samples += stats.get("samples", 0)
        result.converted += stats.get("converted_images", 0)
        for reason, entry in stats.get("left_out", {}).items():
            result.left_out[reason] += entry["samples"]


def _check_policies(data: Dataset, approximate: bool) -> int:
    """The number of operations of a record. Raises UserError for policies that readers of the format do not apply."""
    image, backend = (data.manifest["policies"][name] for name in ("image", "augmentation"))
    if image not in (IMAGE_POLICY, PUBLISHED_POLICY):
        raise UserError(
            f"{data.store.url} has image policy {image}: its crops refer to reduced images, and readers of the format "
            f"decode at full size, by {PUBLISHED_POLICY}. It cannot be exported."
        )
    if backend != AUGMENTATION_BACKEND and not (approximate and backend == FIXED_POINT_BACKEND):
        fix = ""
        if backend == FIXED_POINT_BACKEND:
            fix = " Its pixels differ by at most 2 of 255 levels; --approximate exports it nevertheless."
        raise UserError(
            f"{data.store.url} has augmentation backend {backend}, and readers of the format replay by "
            f"{AUGMENTATION_BACKEND}.{fix}"
        )
    operations = data.manifest["augmentations"].get("rand_augment", {}).get("ops", _PUBLISHED_OPS)
    if not isinstance(operations, int) or not 0 <= operations <= MAX_OPS:
        raise UserError(
            f"{data.store.url} has {operations} operations in a record; the format holds at most {MAX_OPS}."
        )
    return operations


def build_config(data: Dataset, operations: int, precision: str, images: bool) -> dict[str, Any]:
    """``config.json``: the augmentation as the published trainer reads it, and what the tars hold."""
    manifest, first, teachers = data.manifest, 0, []
    for name in data.teachers:
        layer = manifest["layers"][embeddings_layer(name, "images")]
        scale = manifest["teachers"][name].get("logit_scale")
        columns = [first, first := first + layer["dim"]]
        model = manifest["teachers"][name].get("model")
        teachers.append({"name": name, "model": model, "dim": layer["dim"], "columns": columns, "logit_scale": scale})
    captioners = {
        name: {
            "list": LIST_OF.format(name),
            "captions": manifest["layers"][captions_layer(name)]["count"],
            "model": manifest["captioners"][name].get("model"),
        }
        for name in data.captioners
    }
    augmentations = manifest["augmentations"]
    return {
        "model_name": ",".join(data.teachers),
        "num_samples": augmentations["count"],
        "reinforce": {
            "image_augmentation": {
                "normalize": _NORMALIZE,
                "rand_augment": {"enable": True, "p": 1.0, "num_ops": operations},
                "random_resized_crop": {"interpolation": "bicubic", "size": augmentations["size"]},
                "to_rgb": {"enable": True},
                "to_tensor": {"enable": True},
            }
        },
        "reinforced_dataset": {
            "format": PUBLISHED_FORMAT,
            "teachers": without_paths(teachers),
            "captioners": without_paths(captioners),
            "vectors": precision,
            "images": images,
            "policies": manifest["policies"],
            "layers": data.fingerprints,
            **({} if data.view is None else {"view": asdict(data.view.rows)}),
        },
    }
