"""The text of a starter config."""

from __future__ import annotations

import json
import re
import textwrap

from reinforce.engine.starter.fields import CLASS_TEXTS, Fields
from reinforce.input_config import IMAGES_ALONE
from reinforce.settings import load_yaml
from reinforce.source.formats.base import SourceFormat
from reinforce.terminal import escape

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
