"""``reinforce init``: a commented config for the data that it looks at, which ``reinforce plan`` accepts as it is."""

from __future__ import annotations

import glob
import json
import os
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import schemas
from reinforce.config import Config
from reinforce.engine.plan.check_output import overlaps
from reinforce.engine.plan.source_shards import source_shards
from reinforce.engine.starter.fields import CLASS_TEXTS, Fields, class_folders, find_fields
from reinforce.errors import UserError
from reinforce.input_config import IMAGES_ALONE, Input
from reinforce.parallel.machines import nodes_of_run
from reinforce.processes.cores import default_gpus
from reinforce.settings import load_yaml
from reinforce.source.formats.base import Shard, SourceFormat
from reinforce.source.formats.recognise import files_of_folder, format_of_name
from reinforce.source.urls import Info, canonical, filesystem
from reinforce.terminal import escape, format_bytes, plural

_UNMADE = "none"  # folder of an output in which there is no dataset
#: Names of files with captions of images elsewhere, in a folder of images.
_CAPTIONS = ("captions.txt", "captions.csv", "captions*.json", "*/captions.txt", "*/captions*.json")
_PLAIN = re.compile(r"[A-Za-z0-9_./-][A-Za-z0-9_./*-]*(://[A-Za-z0-9_./*-]+)?")
_HEAD = """\
# yaml-language-server: $schema={schema}
# Written by `reinforce init`: {found}. Next:
#   reinforce plan {path}     # what will be computed, and its size; starts nothing
#   reinforce run {path}      # the same command again continues
# `reinforce schema run` describes every key; unknown keys are reported before anything starts.

# Braces such as {{00000..01023}}, globs, a .txt file of URLs, or a list; any fsspec URI.
source: {source}

# A folder or any fsspec URI, such as s3://my-bucket/{name}.
output: {output}

# Everything random is derived from this number and the sample's key.
seed: 0

# `embed` stores a copy of each image in the dataset; `reference` only its place in the source.
{reference}images: embed
"""
_AUGMENTATIONS = """
# Random crops with RandAugment, stored as parameters and replayed bit-exactly for the student. More of them help until
# about 5, and cost as much more; `backend: fixed-point-1` takes less CPU. They are chosen once for a dataset.
augmentations: {{count: 2, size: {size}}}
"""
#: Sides of the crops in pixels, those of the images of the teachers below: of a dual encoder for CPUs, and of others.
_SIZES = {False: 256, True: 224}
_GPU = """
# Each captioner is a layer, captions/<name>. Nothing is needed here for distillation from true captions alone.
captioners:
  coca: {model: coca_ViT-L-14, pretrained: mscoco_finetuned_laion2b_s13b_b90k, captions: 5, top_p: 0.9}

# The ensemble of MobileCLIP2. Another teacher can be added later: only its layers are computed then.
teachers:
  dfn2b: {model: ViT-L-14-quickgelu, pretrained: dfn2b, logit_scale: 70}
  dfn2b-s39b: {model: ViT-L-14, pretrained: dfn2b_s39b, logit_scale: 60}

# A GPU was found here: one worker for each GPU of the machine or cluster.
workers: {batch: auto}
"""
_GPU_ALONE = """
# Teachers of images alone. Another one can be added later: only its layers are computed then.
teachers:
  dinov2: {family: transformers, model: facebook/dinov2-large}
  siglip2: {family: timm, model: vit_so400m_patch14_siglip_224.v2_webli}

# A GPU was found here: one worker for each GPU of the machine or cluster.
workers: {batch: auto}
"""
_CPU_ALONE = """
# No GPU was found here, so this teacher of images alone is small. On GPUs, others are better:
#   dinov2: {family: transformers, model: facebook/dinov2-large}
#   siglip2: {family: timm, model: vit_so400m_patch14_siglip_224.v2_webli}
# Another teacher can be added later: only its layers are computed then.
teachers:
  dinov2-small: {family: transformers, model: facebook/dinov2-small}

# One worker for each core.
workers: {batch: 64}
"""
_CPU = """
# No GPU was found here, so these models are small. A captioner is slow on CPUs; take out the `#` to have one.
# captioners:
#   coca: {model: coca_ViT-B-32, pretrained: mscoco_finetuned_laion2b_s13b_b90k, captions: 1}

# On GPUs, the ensemble of MobileCLIP2 is better (logit scales 70 and 60):
#   dfn2b: {model: ViT-L-14-quickgelu, pretrained: dfn2b, logit_scale: 70}
#   dfn2b-s39b: {model: ViT-L-14, pretrained: dfn2b_s39b, logit_scale: 60}
# Another teacher can be added later: only its layers are computed then.
teachers:
  mobileclip2-s0: {model: MobileCLIP2-S0, pretrained: dfndr2b}

# One worker for each core.
workers: {batch: 64}
"""


def make_starter(data: str, config_path: Path) -> tuple[str, list[str]]:
    """Look at ``data`` -> the text of the config that will be written to ``config_path``, and lines about the data.

    Raises UserError.
    """
    output = f"{_name(data)}-reinforced"
    look = look_at(data, output)
    gpu = bool(default_gpus(nodes_of_run()))
    schema = _schema_for(config_path)
    output = _apart_from(look.source, output)
    text = render(look.source, output, look.found, look.format, look.fields, gpu, schema, str(config_path))
    return text, [f"source: {look.found}", *look.fields.lines(), *look.notes]


def look_at(data: str, output: str) -> Look:
    """What ``data`` is as the source of a run that writes to ``output``. Raises UserError."""
    source, notes = files_of_folder(data)
    look = _look_at(source, output)
    if look.fields.remote and (images := files_of_folder(data, images_first=True))[0] != source:
        source, notes = images  # the table is where images were downloaded from, as img2dataset writes it
        look = _look_at(source, output)
    if not look.fields.has_captions:
        for table in _captions_beside(data):
            try:
                captioned = _look_at(table, output)
            except UserError:  # something else under such a name
                continue
            if captioned.fields.has_captions and captioned.fields.unread is None:
                notes, look = [], captioned
                break
    return replace(look, notes=[*notes, *look.notes])


def _apart_from(source: str, output: str) -> str:
    """The folder ``output`` of the current one, or else of the nearest one above it where it is not in ``source``."""
    for _ in Path.cwd().parents:
        if not any(overlaps(Config(source=source, output=output))):
            break
        output = f"../{output}"
    return output


def _captions_beside(folder: str) -> list[str]:
    """Tables in a folder of images, or one folder below, that are named as Flickr and COCO name captions."""
    fs, path = filesystem(folder)
    if not fs.isdir(path):
        return []
    root, top = folder.rstrip("/"), path.rstrip("/")
    found = [one for pattern in _CAPTIONS for one in sorted(fs.glob(f"{glob.escape(top)}/{pattern}"))]
    paths = [f"{root}{str(one).removeprefix(top)}" for one in found]
    return sorted(paths, key=lambda one: "train" not in one.rpartition("/")[2])


@dataclass(frozen=True)
class Look:
    """What a source is: its URL, a description, its format, the fields of its first shard, and notes.

    ``classes`` are those of its folders, of a folder of images.
    """

    source: str
    found: str
    format: SourceFormat
    fields: Fields
    notes: Sequence[str]
    classes: tuple[str, ...]


def _look_at(source: str, output: str) -> Look:
    listed: dict[str, Info] = {}
    unmade = f"{output}/{_UNMADE}"  # of a dataset that exists, only files that it does not know would be listed
    shards = source_shards(Config(source=source, output=unmade), listed)
    if not shards.urls:
        raise UserError(f"{canonical(source)} has no files. Check the folder.")
    first = shards.names[0].as_py()
    shard = Shard(shards.urls[0], first, shards.format.name, b"".join(shards.lists.values()))
    sizes = [info.get("size") or 0 for info in listed.values()]
    found = _describe(len(shards.urls), shards.format, sum(sizes) if len(sizes) == len(shards.urls) else None)
    return Look(source, found, shards.format, find_fields(shard, Input()), shards.notes, class_folders(shard))


def _name(data: str) -> str:
    """A name for the dataset: the last part of the path that is no pattern, without the ending of a file."""
    parts = [part for part in re.split(r"[/:]+", data.rstrip("/")) if part and not re.search(r"[*?\[{]", part)]
    name = parts[-1] if parts else "data"
    if parts and format_of_name(name):
        name = name.partition(".")[0]
    if name in ("data", "shards", "train", "images", ".", "..") and len(parts) > 1:
        name = parts[-2]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "data"


def default_path(data: str) -> Path:
    """Where a config is written unless a path is given."""
    return Path(f"{_name(data)}.yaml")


def _describe(count: int, format_: SourceFormat, size: int | None) -> str:
    what = format_.noun.removesuffix(" file")
    return f"{plural(count, 'shard')} ({what}{'' if size is None else f', {format_bytes(size)}'})"


def _schema_for(config_path: Path) -> str:
    """Where the schema of the config is, relative to the config if both are in one checkout."""
    schema = Path(schemas.__file__).parent / "json" / "run.json"
    folder = config_path.absolute().parent
    return os.path.relpath(schema, folder) if folder.is_relative_to(schema.parents[2]) else str(schema)


def render(
    source: str, output: str, found: str, format_: SourceFormat, fields: Fields, gpu: bool, schema: str, path: str
) -> str:
    """The config for a source of a format."""
    reference = "" if format_.referable else f"# Sources of format {format_.name} need `embed`.\n"
    head = _HEAD.format(
        schema=_comment(schema),
        found=found,
        path=_comment(path),
        source=_scalar(source),
        output=_scalar(output),
        name=output.rpartition("/")[2],
        reference=reference,
    )
    size = _SIZES[gpu or not fields.has_captions]
    models = (_CPU, _GPU) if fields.has_captions else (_CPU_ALONE, _GPU_ALONE)
    return head + _input(format_, fields) + _AUGMENTATIONS.format(size=size) + models[gpu]


def _input(format_: SourceFormat, fields: Fields) -> str:
    """The section `input`: the keys that were found, and optional ones as comments."""
    lines = [f"format: {format_.name}"]
    if format_.is_table:
        columns = "columns: " + ", ".join(_scalar(name[:40]) for name in fields.names[:20])
        lines = [*(f"# {line}" for line in textwrap.wrap(columns, 110)), *lines]
        lines.append(
            f"image: {_scalar(fields.image)}" if fields.image else "# image: NAME  # the column was recognised"
        )
        lines.append(
            f"# key: {_scalar(fields.other_key)}  # if its values differ; else keys are made of shard and row"
            if fields.other_key
            else "# key: NAME  # default: `key`, `__key__` or `uid`, else shard and row number"
        )
    captions = None if fields.captions is None else json.dumps([*fields.captions], ensure_ascii=False)
    if not fields.has_captions:
        lines.append("# no caption was found: images alone. Else name a member, column or json:FIELD in a list here")
        captions = IMAGES_ALONE
    lines.append(
        f"captions: {captions}" if captions else '# captions: [txt, "json:caption"]  # the first with text is used'
    )
    if fields.images_from is not None:
        lines.append(f"images_from: {_scalar(fields.images_from)}  # where the images are that the table names")
    if fields.classes:
        lines.append(f"templates: {json.dumps([*CLASS_TEXTS])}  # captions of an image, of the name of its folder")
        lines.append(f"captions_per_sample: {len(CLASS_TEXTS)}")
    if fields.several > 1 or fields.only_several:
        start = "" if fields.only_several else "# "
        lines.append(f"# the first samples have up to {fields.several} true captions; each that is kept is embedded")
        lines.append(f"{start}captions_per_sample: {fields.several}")
    return "\n# How files become samples.\ninput:\n" + "".join(f"  {line}\n" for line in lines)


def _comment(text: str) -> str:
    """A path in a comment, which ends with the line."""
    return escape(text).replace("\n", " ")


def _scalar(text: str) -> str:
    """A text as a YAML scalar: quoted unless it is plain, since a name or URL may contain anything."""
    return text if _PLAIN.fullmatch(text) and load_yaml(text) == text else json.dumps(text)
