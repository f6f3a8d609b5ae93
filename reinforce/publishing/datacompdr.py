"""``reinforce export datacompdr``: a dataset as tars in the format of DataCompDR.

The trainer of ml-mobileclip (open_clip with ``training/open_clip_v2.patch``) reads the tars and ``config.json`` as they
are, and ``reinforce run`` reads them as ``reinforcements``. What the format cannot hold is refused before anything is
written. Tars that exist are kept, so that the same command resumes an export.
"""

from __future__ import annotations

import functools
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from reinforce.dataset.augment.fixed_point import FIXED_POINT_BACKEND
from reinforce.dataset.augment.records import AUGMENTATION_BACKEND
from reinforce.dataset.kinds.samples import PUBLISHED_FORMAT
from reinforce.dataset.layers import NO_IMAGES, TRUE_CAPTION, captions_layer, embeddings_layer
from reinforce.dataset.reading.dataset import Dataset
from reinforce.dataset.reading.sample import ImagePolicies
from reinforce.errors import UserError
from reinforce.images.policy import IMAGE_POLICY, PUBLISHED_POLICY
from reinforce.labels.members import MAX_OPS
from reinforce.parallel.map_workers import open_workers
from reinforce.publishing.datacompdr_shard import LIST_OF, ShardExport, export_shard, stats_name, tar_name
from reinforce.publishing.public import without_paths
from reinforce.publishing.shards import ExportSource, check_output, record_export
from reinforce.storage import Storage, as_seen_by_workers
from reinforce.terminal import plural

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
        return [*lines, *self.notes, f"train with ml-mobileclip: {shlex.join(self._flags())}"]

    def _flags(self) -> Iterable[str]:
        teachers = self.config["reinforced_dataset"]["teachers"]
        yield from ("--dataset-reinforcement", "--dataset-reinforcement-config", f"{self.output}/{CONFIG}")
        yield from ("--distill-teacher-dimension", *(str(teacher["dim"]) for teacher in teachers))
        if all(teacher["logit_scale"] for teacher in teachers):
            yield from ("--distill-logit-scale", *(f"{teacher['logit_scale']:g}" for teacher in teachers))
        yield from ("--distill-loss-weights", "0.0", "1.0")  # of CLIP's loss and the distillation; else both count 1
        yield "--distill-average-after-softmax"


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
    _check_teachers(data)
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
        missing = [shard for shard in shards if tar_name(shard) not in written]
        found = {shard: output.read_json(stats_name(shard)) or {} for shard in shards if tar_name(shard) in written}
        result.kept = len(found)
        with open_workers(address, use_ray) as workers:
            found |= workers.map(functools.partial(export_shard, export), missing, unit="shard")
    result.shards = len(found)
    for stats in found.values():
        result.samples += stats.get("samples", 0)
        result.converted += stats.get("converted_images", 0)
        for reason, entry in stats.get("left_out", {}).items():
            result.left_out[reason] += entry["samples"]


def _check_teachers(data: Dataset) -> None:
    """Raise UserError unless each teacher has the vectors that the format concatenates."""
    if not data.teachers:
        raise UserError("--teachers: name at least one teacher.")
    for teacher in data.teachers:
        needed = [embeddings_layer(teacher, inputs) for inputs in ("images", TRUE_CAPTION, *data.captioners)]
        if missing := [layer for layer in needed if layer not in data.layers]:
            raise UserError(
                f"{data.store.url} has no {', '.join(missing)}, and the format holds vectors of all teachers for "
                "images and all texts. Choose teachers and captioners by --teachers and --captioners."
            )


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
