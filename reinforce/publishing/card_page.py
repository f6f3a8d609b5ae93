"""The text of a dataset's card. What comes from data or configs is escaped for Markdown."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from reinforce.dataset.layers import NO_IMAGES, SAMPLES, Layer
from reinforce.dataset.view import View
from reinforce.labels.index import IdentityIndex
from reinforce.terminal import escape, format_bytes, plural

#: By which a README.md is recognised as one that may be replaced.
MARK = "<!-- written by `reinforce card` -->"
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+\-.!|~:@$=])")
_MAX_CHARS = 200
_KINDS = {
    "uid": "the uid in the data set that the sample is from",
    "sha256": "SHA-256 of the downloaded file",
    "digest": "BLAKE2b-64 of the encoded image",
    "url": "where the image was downloaded from",
    "key": "the key of a row of which nothing else is stated",
}


@dataclass(frozen=True)
class LayerCard:
    """A layer as the card shows it: its configuration for ``datasets``, and numbers of its files."""

    layer: Layer
    schema: pa.Schema
    shards: int
    rows: int
    size: int

    @property
    def name(self) -> str:
        return self.layer.name

    @property
    def config(self) -> str:
        """Name of the configuration, which cannot contain a slash."""
        return self.name.replace("/", "--")


def markdown(value: object) -> str:
    """A value as text of one line that Markdown shows as it is."""
    text = one_line(value)
    shown = _SPECIAL.sub(r"\\\1", text[:_MAX_CHARS]) + ("..." if len(text) > _MAX_CHARS else "")
    return html.escape(shown)


def one_line(value: object) -> str:
    """A value as text without line ends and control characters."""
    return " ".join(escape(str(value)).split())


def view_config(view: View) -> str:
    """Name of the configuration that has the rows of a view."""
    return f"views--{view.name}"


def index_config(kind: str) -> str:
    """Name of the configuration that has the entries of a kind of identities, or the shards that they name."""
    return f"identities--{kind}"


def render_page(
    url: str,
    manifest: Mapping[str, Any],
    layers: Sequence[LayerCard],
    views: Sequence[View],
    licence: str,
    index: IdentityIndex | None = None,
) -> str:
    """The card below its front matter."""
    samples = next(layer for layer in layers if layer.name == SAMPLES)
    size = format_bytes(sum(layer.size for layer in layers))
    parts = [
        MARK,
        f"# {markdown(url.rpartition('/')[2])}",
        f"{_subject(manifest)}: {samples.rows:,} image-text pairs with stored augmentations, embeddings of teachers "
        f"and synthetic captions, in {plural(samples.shards, 'shard')}, {size}. Licence: {markdown(licence)}.",
        "## Layers",
        "All layers have the same rows in the same order within each shard; `key` names a row within its shard.",
        _table(
            ("configuration", "rows", "shards", "size", "content"),
            ((f"`{one.config}`", f"{one.rows:,}", f"{one.shards:,}", format_bytes(one.size),
              one.layer.kind.card_content(one.layer))
             for one in layers),
        ),
    ]  # fmt: skip
    rows: Iterable[Sequence[str]]
    if manifest["teachers"]:
        rows = ((markdown(name), markdown(_model(entry)), markdown(entry.get("dim")), _scale(entry))
                for name, entry in manifest["teachers"].items())  # fmt: skip
        parts += ["## Teachers", _table(("name", "model", "dimension", "logit scale"), rows)]
    if manifest["captioners"]:
        rows = ((markdown(name), markdown(_model(entry))) for name, entry in manifest["captioners"].items())
        parts += ["## Captioners", _table(("name", "model"), rows)]
    if views:
        rows = ((f"`{view_config(view)}`", f"{len(view):,}", markdown(json.dumps([*view.rules]))) for view in views)
        text = "Rows have `left_out`, the rule that leaves the sample out: null for the samples that the view keeps."
        parts += ["## Views", text, _table(("configuration", "samples", "rules, in order"), rows)]
    if index is not None:
        rows = ((f"`{index_config(kind)}`", f"{count:,}", _KINDS[kind]) for kind, count in index.kinds.items())
        text = "Rows have the hash of an identity, the number of a shard in `identities--shards`, and the row in it."
        parts += ["## Identities", text, _table(("configuration", "rows", "what is stated"), rows)]
    if manifest["images"] == NO_IMAGES:
        rows = ((f"`{one.config}`", f"`{one_line(one.layer.fingerprint)}`") for one in layers)
        text = "Fingerprints of the layers that were published: hashes of all that determines their content."
        parts += ["## Provenance", text, _table(("configuration", "fingerprint"), rows)]
    parts += [*_policies(manifest), *_usage(manifest, layers)]
    return "\n\n".join(parts) + "\n"


def _subject(manifest: Mapping[str, Any]) -> str:
    return "Labels without images" if manifest["images"] == NO_IMAGES else "A reinforced dataset"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _model(entry: Mapping[str, Any]) -> str:
    """The model of a teacher or captioner, as its identity names it."""
    identity = entry.get("model")
    if not isinstance(identity, Mapping):
        return str(identity)
    named = [identity.get(key) for key in ("class", "model", "pretrained", "texts")]
    return ", ".join(str(value) for value in named if value) or "unknown"


def _scale(entry: Mapping[str, Any]) -> str:
    scale = entry.get("logit_scale")
    return "none" if scale is None else f"{scale:g}"


def _policies(manifest: Mapping[str, Any]) -> list[str]:
    augmentations, policies = manifest["augmentations"], manifest.get("policies", {})
    return [
        "## Augmentations",
        f"{markdown(augmentations.get('count'))} records for each image, at {augmentations['size']} pixels: vector k "
        f"of a teacher's images belongs to record k. Image policy {markdown(policies.get('image'))}, augmentation "
        f"backend {markdown(policies.get('augmentation'))}.",
    ]


def _usage(manifest: Mapping[str, Any], layers: Sequence[LayerCard]) -> list[str]:
    lines = [
        "from datasets import load_dataset",
        "",
        f'samples = load_dataset("ORG/NAME", "{SAMPLES}", split="train")  # or streaming=True',
    ]
    vectors = next((layer for layer in layers if "embeddings" in layer.schema.names), None)
    if vectors is not None:
        count, dim = vectors.layer.count, vectors.layer.dim
        scaled = "scales" in vectors.schema.names
        lines += [
            f'vectors = load_dataset("ORG/NAME", "{vectors.config}", split="train")',
            'assert samples["key"][:] == vectors["key"][:]  # where both have all shards; else join by key',
            f'first = np.array(vectors[0]["embeddings"], np.float32).reshape({count}, {dim})',
        ]
        lines.insert(0, "import numpy as np")
        if scaled:
            lines.append('first *= np.array(vectors[0]["scales"])[:, None]')
    if manifest["images"] == NO_IMAGES:
        lines.append("# Images are not included: uid, sha256, image_digest and url state which image a row is of.")
    if manifest["images"] == "reference":
        lines.append("# Images are not included: `image_ref` names the file and the place of each.")
    return [
        "## Use",
        "```python\n" + "\n".join(lines) + "\n```",
        "The program that wrote the dataset reads all layers together by `reinforce.open(URL)`, and replays "
        "augmentations pixel for pixel. `dataset.json` describes every layer.",
    ]
