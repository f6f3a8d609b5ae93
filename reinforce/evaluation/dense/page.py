"""A page of segmentations: images of sets with masks, their true classes, and those that each model finds."""

from __future__ import annotations

import colorsys
import io
from functools import lru_cache

import numpy as np
from PIL import Image

from reinforce.evaluation.dense.masks import IGNORED
from reinforce.evaluation.report import Report, Segmented
from reinforce.markup import TEMPLATES, picture_address, render
from reinforce.storage import write_file

#: Images of each set.
SHOWN = 12
_SIDE = 320  # pixels of the longer side of a picture
_OPACITY = 0.7
_GOLDEN = 0.618034  # of the circle of hues: neighbours in the list of classes differ


def draw(key: str, image: Image.Image, true: np.ndarray, found: np.ndarray, right: float) -> Segmented:
    """The pictures of an image; ``true`` and ``found`` [H, W] are its class indices."""
    image = image.copy()
    image.thumbnail((_SIDE, _SIDE))
    pixels = np.asarray(image)
    return Segmented(key, _encode(pixels), _encode(_coloured(image, true)), _encode(_coloured(image, found)), right)


def write_page(report: Report, url: str) -> None:
    """Write one HTML file with the pictures in it."""
    sets = []
    for name in dict.fromkeys(name for result in report.results.values() for name in result.sets):
        columns = {}
        for model, result in report.results.items():
            for of_model in result.sets[name].segmented.values():
                columns[model] = (result.metrics.get(f"{name}/miou"), {one.key: one for one in of_model})
        if columns:
            keys = dict.fromkeys(key for _, found in columns.values() for key in found)
            rows = [(key, [found.get(key) for _, found in columns.values()]) for key in keys]
            sets.append((name, [(model, score) for model, (score, _) in columns.items()], rows))
    style = (TEMPLATES / "report" / "report.css").read_text(encoding="utf-8")
    page = render("segmentation.html", style=style, sets=sets, address=picture_address)
    write_file(page.encode(), url)


def _coloured(image: Image.Image, labels: np.ndarray) -> np.ndarray:
    """The image under the colours of its classes; ignored pixels stay."""
    small = np.asarray(Image.fromarray(labels.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST))
    pixels = np.asarray(image, np.float32)
    mixed = pixels + _OPACITY * (_colours()[small] - pixels)
    return np.where((small == IGNORED)[:, :, None], pixels, mixed).astype(np.uint8)


@lru_cache(maxsize=1)
def _colours() -> np.ndarray:
    """A colour for each class index, float32 [256, 3]; the first is black, as the background of many sets."""
    hues = [colorsys.hsv_to_rgb(index * _GOLDEN % 1, 0.55 + 0.45 * (index % 3) / 2, 1.0) for index in range(255)]
    return 255 * np.array([(0, 0, 0), *hues], np.float32)


def _encode(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", quality=80)
    return buffer.getvalue()
