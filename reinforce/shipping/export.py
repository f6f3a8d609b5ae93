"""``reinforce export onnx``: a folder that runs a model without torch and open_clip.

The towers are compared with torch, and the tokenizer with open_clip's, before the folder is published.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch.nn.functional import normalize

from reinforce.errors import UserError
from reinforce.model_names import model_errors, short_name
from reinforce.shipping import graph, tokens
from reinforce.shipping.graph import Tower
from reinforce.shipping.packages import require_export_packages
from reinforce.shipping.readme import render_readme
from reinforce.shipping.towers import reparameterize, split_towers
from reinforce.storage import Storage
from reinforce.terminal import format_bytes
from teachers.open_clip.teacher import image_spec, load_model, model_name
from teachers.preprocessing.pixels import to_pixels
from teachers.protocols import ImageSpec
from teachers.spec import ModelSpec

#: Largest allowed difference between an element of an embedding and torch's.
MAX_DIFFERENCE = 1e-4
_BATCHES = (1, 3, 8)


@dataclass
class ExportResult:
    """The exported folder: ``differences`` from torch by tower, and ``sizes`` in bytes by file."""

    output: str
    differences: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        batches = ", ".join(map(str, _BATCHES))
        return [
            *(
                f"{name}.onnx: {format_bytes(self.sizes[f'{name}.onnx'])}; at most {difference:.1e} from torch, "
                f"in batches of {batches}"
                for name, difference in self.differences.items()
            ),
            f"tokenizer.json: same tokens as open_clip for {len(tokens.PROBES)} test texts",
            f"written: {self.output}; its README.md has an example",
        ]


def export_onnx(name: str, spec: ModelSpec, output: str) -> ExportResult:
    """Write a model to ``output``, a new folder or fsspec URL. Raises UserError, and then nothing is written."""
    require_export_packages()
    store = Storage(output)
    _check_new(store)
    result = ExportResult(store.url)  # redacted, unlike ``output``
    with model_errors(name), _publish_folder(store) as folder:
        clip = load_model(spec).eval().requires_grad_(False)
        image = image_spec(open_clip.get_model_preprocess_cfg(clip))
        tokenizer = tokens.convert_tokenizer(model_name(spec))
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        probes = torch.tensor([text.ids for text in tokenizer.encode_batch(list(tokens.PROBES))])
        for tower in split_towers(reparameterize(clip), image, probes):
            path = folder / f"{tower.name}.onnx"
            graph.write_onnx(tower, path, {"model": short_name(name)})
            result.differences[tower.name] = _compare_with_torch(tower, path, _reference(clip, image, tower.name))
        config = _preprocess_config(name, clip, image, tuple(probes.shape)[1])
        (folder / "preprocess.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(render_readme(config, image), encoding="utf-8")
        result.sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    return result


def _reference(clip: Any, spec: ImageSpec, tower: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a tower of the trained model in torch, before reparameterization."""
    if tower == "image":
        return lambda images: normalize(clip.encode_image(to_pixels(images, spec)), dim=-1)
    return lambda texts: normalize(clip.encode_text(texts), dim=-1)


def _compare_with_torch(tower: Tower, path: Path, reference: Callable[[torch.Tensor], torch.Tensor]) -> float:
    difference = graph.largest_difference(path, reference, map(tower.example, _BATCHES))
    if not difference <= MAX_DIFFERENCE:
        raise ValueError(
            f"its {tower.name} tower in onnxruntime differs by {difference:.1e} from torch, more than the allowed "
            f"{MAX_DIFFERENCE:.0e}: look for weights that are not finite or very large, or try other versions of onnx, "
            "onnxscript and onnxruntime"
        )
    return difference


def _preprocess_config(name: str, clip: Any, spec: ImageSpec, context_length: int) -> dict[str, Any]:
    """Return the content of ``preprocess.json``, with open_clip's keys where they exist."""
    bias = getattr(clip, "logit_bias", None)
    return {
        "model": short_name(name),
        "size": [spec.height, spec.width],
        "mode": "RGB",
        "resize_mode": "shortest" if spec.resize == "crop" else "squash",
        "interpolation": spec.interpolation,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "normalised_by": "image.onnx",
        "context_length": context_length,
        "dim": int(clip.encode_text(torch.zeros(1, context_length, dtype=torch.long)).shape[1]),
        "logit_scale": float(clip.logit_scale.exp()),
        "logit_bias": None if bias is None else float(bias),
    }


def _check_new(store: Storage) -> None:
    """Raise UserError if the output exists and is not an empty folder, so that files of two models never mix."""
    if store.fs.exists(store.root) and (not store.fs.isdir(store.root) or store.fs.ls(store.root)):
        raise UserError(f"{store.url} already exists: remove it, or give another --output.")
    if store.local:
        try:
            os.makedirs(os.path.dirname(store.root) or ".", exist_ok=True)
        except OSError as error:
            raise UserError(f"{store.url} cannot be written: {error}. Give another --output.") from error


@contextlib.contextmanager
def _publish_folder(store: Storage) -> Iterator[Path]:
    """Yield a local folder that is published when the block ends, and discarded if it raises.

    On a local disk the whole folder appears atomically; in an object store each file does.
    """
    parent = (os.path.dirname(store.root) or ".") if store.local else None
    with tempfile.TemporaryDirectory(prefix=".reinforce-", dir=parent) as temporary:
        folder = Path(temporary, "folder")
        folder.mkdir()
        yield folder
        if not store.local:
            store.put_folder(str(folder))
            return
        for path in folder.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        os.replace(folder, store.root)
