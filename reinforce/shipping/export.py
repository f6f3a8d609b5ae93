"""``reinforce export onnx``: a folder with which a model runs where neither torch nor open_clip is.

The folder appears whole, after its towers have been compared with torch and its tokenizer with open_clip's.
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
from reinforce.shipping import graph, tokens, usage
from reinforce.shipping.graph import Side
from reinforce.shipping.packages import require
from reinforce.shipping.towers import reparameterised, sides
from reinforce.storage import Storage
from reinforce.terminal import format_bytes
from teachers.open_clip import image_spec, load_model, model_name
from teachers.pixels import to_pixels
from teachers.protocols import ImageSpec
from teachers.spec import ModelSpec

#: How far a number of an embedding may be from torch's.
LIMIT = 1e-4
_BATCHES = (1, 3, 8)


@dataclass
class Exported:
    """``differences`` from torch by tower and ``sizes`` in bytes by file, of what was written to ``output``."""

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
            f"tokenizer.json: open_clip's tokens for {len(tokens.PROBES)} texts of all kinds",
            f"written: {self.output}, whose README.md shows how it is used",
        ]


def export_onnx(name: str, spec: ModelSpec, output: str) -> Exported:
    """Write a model to ``output``, a new folder or fsspec URL. Raises UserError, and then nothing is written."""
    require()
    store = Storage(output)
    _check_new(store)
    exported = Exported(store.url)  # without secrets
    with model_errors(name), _appearing(store) as folder:
        clip = load_model(spec).eval().requires_grad_(False)
        image = image_spec(open_clip.get_model_preprocess_cfg(clip))
        tokenizer = tokens.shipped(model_name(spec))
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        probes = torch.tensor([text.ids for text in tokenizer.encode_batch(list(tokens.PROBES))])
        for side in sides(reparameterised(clip), image, probes):
            path = folder / f"{side.name}.onnx"
            graph.write_onnx(side, path, {"model": short_name(name)})
            exported.differences[side.name] = _checked(side, path, _reference(clip, image, side.name))
        about = _about(name, clip, image, tuple(probes.shape)[1])
        (folder / "preprocess.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(usage.readme(about, image), encoding="utf-8")
        exported.sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    return exported


def _reference(clip: Any, spec: ImageSpec, side: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model as it was trained, in torch."""
    if side == "image":
        return lambda images: normalize(clip.encode_image(to_pixels(images, spec)), dim=-1)
    return lambda texts: normalize(clip.encode_text(texts), dim=-1)


def _checked(side: Side, path: Path, reference: Callable[[torch.Tensor], torch.Tensor]) -> float:
    difference = graph.largest_difference(path, reference, map(side.rows, _BATCHES))
    if not difference <= LIMIT:
        raise ValueError(
            f"its {side.name} tower in onnxruntime is {difference:.1e} from torch and may be {LIMIT:.0e}: look for "
            "weights that are not finite or very large, or try another version of onnx, onnxscript and onnxruntime"
        )
    return difference


def _about(name: str, clip: Any, spec: ImageSpec, context_length: int) -> dict[str, Any]:
    """``preprocess.json``, in open_clip's words where it has some."""
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
    """Files of an old model must not stand beside those of a new one. Raises UserError."""
    if store.fs.exists(store.root) and (not store.fs.isdir(store.root) or store.fs.ls(store.root)):
        raise UserError(f"{store.url} is there already: remove it, or give another --output.")
    if store.local:
        try:
            os.makedirs(os.path.dirname(store.root) or ".", exist_ok=True)
        except OSError as error:
            raise UserError(f"{store.url} cannot be written: {error}. Give another --output.") from error


@contextlib.contextmanager
def _appearing(store: Storage) -> Iterator[Path]:
    """A local folder, which is published when the block ends and dropped if it raises.

    On a disk it appears as a whole; in an object store each file does.
    """
    beside = (os.path.dirname(store.root) or ".") if store.local else None
    with tempfile.TemporaryDirectory(prefix=".reinforce-", dir=beside) as temporary:
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
