"""README.md of an exported model: its files, and an example that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from teachers.protocols import ImageSpec

_README = """# {model} in {title}

| file | content |
| --- | --- |
| `image.{end}` | `images`, uint8 [{n}, {height}, {width}, 3] in RGB -> `embeddings`, float32 [{n}, {dim}], unit norm |
| `text.{end}` | `tokens`, {integers} [{n}, {context}] -> `embeddings`, float32 [{n}, {dim}], unit norm |
| `tokenizer.json` | tokenizer for the package `tokenizers`; pads and truncates to {context} tokens |
| `preprocess.json` | how to resize an image to {height} x {width}, and the logit scale |

`image.{end}` takes bytes: it normalizes by mean and standard deviation itself. {note}

Before an image is resized, its orientation (EXIF) is applied and its transparency is composited on white, as in the
example; `convert("RGB")` alone does neither.

Install `pip install {packages} pillow numpy tokenizers`, and run this in the folder:

```python
import json

import numpy as np
{imports}
from PIL import Image, ImageOps
from tokenizers import Tokenizer

config = json.load(open("preprocess.json"))
image = ImageOps.exif_transpose(Image.open("cat.jpg")).convert("RGBA")
image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
{resize}
tokens = [text.ids for text in Tokenizer.from_file("tokenizer.json").encode_batch(["a cat", "a dog"])]
{run}
logits = config["logit_scale"] * images @ texts.T
print(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())
```
"""

_COREML = """# {model} in Core ML

| file | content |
| --- | --- |
| `{image_file}` | `image`, a 32-bit colour picture of {width} x {height} -> `final_emb_1`, float32 [1, {dim}] |
| `{text_file}` | `text`, int32 [1, {context}], padded with zeros -> `final_emb_1`, float32 [1, {dim}], unit norm |
| `tokenizer.json` | tokenizer in the format of the package `tokenizers`; pads and truncates to {context} tokens |
| `preprocess.json` | how to resize an image to {height} x {width}, and the logit scale |
| `golden.json` | pictures and texts, with the pixels, tokens and embeddings that an app must arrive at |
| `export.json` | sizes, cosines to the trained model, and what computed them |

The packages need iOS 17 or macOS 14. The image package takes pixels: scale, mean and standard deviation are inside.
Before that a picture is turned upright by its EXIF orientation, put on white where it is transparent, and
{resize}.
Both embeddings have unit norm: their dot product is the cosine. The softmax of `logit_scale` (in `preprocess.json`)
times the cosines gives the probabilities of texts.

Drop both packages into an Xcode project, which generates a class with the name of each:

```swift
let images = try {image_class}(configuration: MLModelConfiguration())
let texts = try {text_class}(configuration: MLModelConfiguration())
let image = try images.prediction(image: pixelBuffer).final_emb_1
let text = try texts.prediction(text: tokens).final_emb_1  // MLMultiArray [1, {context}] of int32
```

Check the packages on a Mac, in Core ML itself: `reinforce export coreml THIS_FOLDER --check`.
"""

ONNX = {
    "title": "ONNX", "end": "onnx", "n": "N", "integers": "int64", "packages": "onnxruntime",
    "imports": "import onnxruntime",
    "note": """N may be any
number. Weights of 1.9 GB or more are stored in `.onnx.data` files next to the graphs.""",
    "run": """images = onnxruntime.InferenceSession("image.onnx").run(None, {"images": np.asarray(image)[None]})[0]
texts = onnxruntime.InferenceSession("text.onnx").run(None, {"tokens": np.array(tokens, np.int64)})[0]""",
}  # fmt: skip

_ONE_ROW = "A file\ntakes one image or one text at a time."

LITERT = {
    "title": "LiteRT", "end": "tflite", "n": "1", "integers": "int32", "packages": "ai-edge-litert",
    "imports": "from ai_edge_litert.interpreter import Interpreter",
    "note": _ONE_ROW,
    "run": """

def run(file, rows):
    interpreter = Interpreter(file)
    interpreter.allocate_tensors()
    embeddings = []
    for row in rows:
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], row[None])
        interpreter.invoke()
        embeddings.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"])[0])
    return np.stack(embeddings)


images = run("image.tflite", np.asarray(image)[None])
texts = run("text.tflite", np.array(tokens, np.int32))""",
}  # fmt: skip

EXECUTORCH = {
    "title": "ExecuTorch", "end": "pte", "n": "1", "integers": "int64", "packages": "executorch torch",
    "imports": "import torch\nfrom executorch.runtime import Runtime",
    "note": _ONE_ROW,
    "run": """

def run(file, rows):
    method = Runtime.get().load_program(file).load_method("forward")
    return np.stack([method.execute([torch.tensor(row[None])])[0][0].numpy().copy() for row in rows])


images = run("image.pte", np.asarray(image)[None])
texts = run("text.pte", np.array(tokens))""",
}  # fmt: skip

_CROP_SQUARE = """size = config["size"][0]
image = image.resize([int(size * side / min(image.size)) for side in image.size], Image.Resampling.{filter})
left, top = [round((side - size) / 2) for side in image.size]
image = image.crop((left, top, left + size, top + size))"""

_CROP = """height, width = config["size"]
scale = min(image.width / width, image.height / height)
image = image.resize([round(side / scale) for side in image.size], Image.Resampling.{filter})
left, top = round((image.width - width) / 2), round((image.height - height) / 2)
image = image.crop((left, top, left + width, top + height))"""

_SQUASH = """image = image.resize(config["size"][::-1], Image.Resampling.{filter})"""


def render(runtime: Mapping[str, str], config: Mapping[str, Any], spec: ImageSpec) -> str:
    """Return the README of a model in a runtime, such as ``ONNX``; ``config`` is that of its ``preprocess.json``."""
    crop = _CROP_SQUARE if spec.height == spec.width else _CROP
    resize = (_SQUASH if spec.resize == "squash" else crop).format(filter=spec.interpolation.upper())
    return _README.format(
        model=config["model"],
        height=spec.height,
        width=spec.width,
        dim=config["dim"],
        context=config["context_length"],
        resize=resize,
        **runtime,
    )


def render_coreml(config: Mapping[str, Any], spec: ImageSpec) -> str:
    """Return the README of two Core ML packages. ``config`` is the content of their ``preprocess.json``."""
    size = f"{spec.width} x {spec.height}"
    ways = {
        "crop": f"resized ({spec.interpolation}) until it covers {size}, whose centre is cut out",
        "squash": f"resized ({spec.interpolation}) to {size}, whatever its proportions",
    }
    image_file = config["normalised_by"]
    text_file = image_file.replace("_image.", "_text.")
    return _COREML.format(
        model=config["model"],
        image_file=image_file,
        text_file=text_file,
        image_class=image_file.partition(".")[0],
        text_class=text_file.partition(".")[0],
        height=spec.height,
        width=spec.width,
        dim=config["dim"],
        context=config["context_length"],
        resize=ways[spec.resize],
    )
