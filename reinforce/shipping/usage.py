"""The README.md of an exported model: what its files are, and lines that use them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from teachers.protocols import ImageSpec

_README = """# {model} in ONNX

| file | what it is |
| --- | --- |
| `image.onnx` | `images`, uint8 [N, {height}, {width}, 3] of RGB -> `embeddings`, float32 [N, {dim}] of unit norm |
| `text.onnx` | `tokens`, int64 [N, {context}] -> `embeddings`, float32 [N, {dim}] of unit norm |
| `tokenizer.json` | texts to tokens, padded and cut, with the package `tokenizers` |
| `preprocess.json` | how a picture gets to {height} x {width}, and the scale of the logits |

Pixels are bytes: mean and standard deviation are inside `image.onnx`. N is any number, and weights of 1.9 GB or more
are in `.onnx.data` files beside the graphs. A picture's orientation (EXIF) and transparency are the caller's: apply the
one, and put the other on white.

`pip install onnxruntime pillow numpy tokenizers`, and in this folder:

```python
import json

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

about = json.load(open("preprocess.json"))
image = Image.open("cat.jpg").convert("RGB")
{resize}
tokens = [text.ids for text in Tokenizer.from_file("tokenizer.json").encode_batch(["a cat", "a dog"])]
images = onnxruntime.InferenceSession("image.onnx").run(None, {{"images": np.asarray(image)[None]}})[0]
texts = onnxruntime.InferenceSession("text.onnx").run(None, {{"tokens": np.array(tokens, np.int64)}})[0]
logits = about["logit_scale"] * images @ texts.T
print(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())
```
"""

_CROP_SQUARE = """size = about["size"][0]
image = image.resize([int(size * side / min(image.size)) for side in image.size], Image.Resampling.{filter})
left, top = [round((side - size) / 2) for side in image.size]
image = image.crop((left, top, left + size, top + size))"""

_CROP = """height, width = about["size"]
scale = min(image.width / width, image.height / height)
image = image.resize([round(side / scale) for side in image.size], Image.Resampling.{filter})
left, top = round((image.width - width) / 2), round((image.height - height) / 2)
image = image.crop((left, top, left + width, top + height))"""

_SQUASH = """image = image.resize(about["size"][::-1], Image.Resampling.{filter})"""


def readme(about: Mapping[str, Any], spec: ImageSpec) -> str:
    """For a model that ``preprocess.json`` tells ``about``."""
    crop = _CROP_SQUARE if spec.height == spec.width else _CROP
    resize = (_SQUASH if spec.resize == "squash" else crop).format(filter=spec.interpolation.upper())
    return _README.format(
        model=about["model"],
        height=spec.height,
        width=spec.width,
        dim=about["dim"],
        context=about["context_length"],
        resize=resize,
    )
