"""The image policy: decode an encoded image to RGB pixels, or refuse it with a reason."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import struct
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageFile

from reinforce.errors import UserError
from reinforce.images import jpeg
from reinforce.processes.imports import HEIC_HINT, reads_heic
from reinforce.source.config import LIMITS, Limits
from schemas import Reason

if TYPE_CHECKING:
    from reinforce.config import Config

#: Name and version of the conversion to RGB in :func:`decode`; recorded in dataset.json.
IMAGE_POLICY = "rgb-1"
#: The policy of published reinforcements, whose augmentations were made on Pillow's ``convert("RGB")``.
PUBLISHED_POLICY = "pillow-rgb-1"
#: The policy that decodes large JPEGs at a fraction of their size; its name ends with the side that is kept.
_REDUCED_POLICY = re.compile(r"rgb-1-reduced-([1-9][0-9]{0,4})")
#: For messages.
IMAGE_POLICIES = f"{IMAGE_POLICY}, {IMAGE_POLICY}-reduced-N and {PUBLISHED_POLICY}"

#: Accepted formats, by Pillow's names, in the order in which they are tried.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
_JPEGS = ("JPEG", "MPO")
#: The format of HEIC, by pillow-heif, and how the brands of its files begin: images and sequences in HEVC.
_HEIF, _HEIC_BRANDS = "HEIF", (b"hei", b"hev")
_BRAND_BYTES = 64
_ZEROS = bytes(1024)  # HEVC has no three zero bytes in a row; the decoder fills in what is missing

_PLAIN_FORMATS, _PLAIN_MODES = ("JPEG", "PNG", "BMP", "PPM"), ("RGB", "L", "P", "1", "CMYK")
_WHITE = (255, 255, 255)
_STRIP_PIXELS = 2**20
_LARGE_PIXELS = 16 * 2**20
#: Decoding a large image takes up to 1 GB, so only one is decoded at a time: in this process, unless a process sets a
#: lock that several share.
large_image_lock: contextlib.AbstractContextManager[Any] = threading.Lock()
_JPEG_START_OF_SCAN = b"\xff\xda"
_EXIF_ORIENTATION = 0x0112
_TRANSPOSE_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def limits_of_reader(recorded: Limits) -> Limits:
    """The limits that a dataset records, whoever made it, with those of its images lowered to ``wide`` ones."""
    most = LIMITS["wide"]
    lowered = {name: min(getattr(most, name), getattr(recorded, name)) for name in ("image_bytes", "pixels")}
    return recorded.model_copy(update=lowered)


def reads_crops(config: Config) -> bool:
    """Whether the augmentation records of a run are those of its published reinforcements."""
    return config.reinforcements is not None and not config.augmentations.own


def image_policy(config: Config) -> str:
    """Return the image policy of a run: with published crops, the policy that they were made with."""
    if (labels := config.labels_of_crops) is not None:
        return config.labels[labels].taken.image_policy
    if reads_crops(config):
        return PUBLISHED_POLICY
    side = config.input.reduce_to
    return IMAGE_POLICY if side is None else f"{IMAGE_POLICY}-reduced-{side}"


def is_image_policy(name: str) -> bool:
    """Whether ``decode`` implements the policy of this name."""
    return name in (IMAGE_POLICY, PUBLISHED_POLICY) or _REDUCED_POLICY.fullmatch(name) is not None


class ImageRefused(Exception):
    """The image cannot be used; ``reason`` is one of the ``IMAGE_*`` reasons."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail


def decode(data: bytes, limits: Limits, strict: bool = False, policy: str = IMAGE_POLICY) -> Image.Image:
    """Decode an image to RGB at its own size, by policy ``rgb-1``. Thread-safe.

    - The format is detected from the content, not from the name. Size and aspect ratio are checked against the header,
      before decoding.
    - The first frame of an animation is used. EXIF orientation is applied. Transparent pixels are composited over
      white.
    - 16-bit grey is divided by 257. 32-bit and float grey is divided by its white level, which is the smallest of 1
      (float only), 255, 65535 and the image's maximum that no pixel exceeds; negative and NaN pixels become black.
    - CMYK, YCbCr, LAB, HSV and 1-bit images are converted as Pillow does.
    - ICC profiles are ignored: most are sRGB, and a broken profile should not cost an image.
    - A HEIC is decoded by pillow-heif, if it is installed: its primary image, turned and mirrored as the file states,
      with 8 bits a channel. Its EXIF orientation is ignored, as HEIF requires.

    ``strict`` is for images that are not yet in a dataset. It also refuses JPEGs with too little scan data, which
    libjpeg fills in silently, HEICs that end in zeros, JPEGs with more than ``limits.scans`` scans, which can take
    hours to decode, and PNGs whose pixel data does not have its checksums. Stored images are read without it, so that
    they stay readable.
    With ``policy`` ``pillow-rgb-1`` the conversion is ``Image.convert("RGB")`` alone: EXIF orientation and transparency
    are ignored. With ``rgb-1-reduced-N`` a JPEG is decoded at 1/8, 1/4 or 1/2 of its size, the first of these at which
    both sides keep at least N pixels (the full side // N decides, and sides are rounded up), or at its size. The
    limits apply to the full size.
    Raises ImageRefused, also for truncated data.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise UserError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, which lets broken images pass. Turn it off.")
    try:
        image = _open(data)
        _check_size(image.size, limits)
        if strict and image.format in _JPEGS and (scans := data.count(_JPEG_START_OF_SCAN)) > limits.scans:
            raise ImageRefused(Reason.IMAGE_SCANS, f"{scans} scans, above limits.scans of {limits.scans}")
        if image.format in _JPEGS and (reduced := _REDUCED_POLICY.fullmatch(policy)):
            image.draft(None, (int(reduced[1]),) * 2)  # chooses the scale at which it is decoded
        with large_image_lock if image.width * image.height > _LARGE_PIXELS else contextlib.nullcontext():
            if not jpeg.load(image, data):
                image.load()
            _check_size(image.size, limits)  # a first frame may enlarge the canvas
            _check_complete(image, data, strict)
            if policy == PUBLISHED_POLICY:
                image = image.convert("RGBA") if image.mode == "P" else image  # same colours, no warning
                return _plain(image if image.mode == "RGB" else image.convert("RGB"))
            depth = jpeg.header(data).depth if image.format == "PNG" else 8
            return _plain(_apply_orientation(_to_rgb(image, depth), image))
    except ImageRefused:
        raise
    except Image.DecompressionBombError as error:
        raise ImageRefused(Reason.IMAGE_PIXELS, _describe(error)) from error
    except Exception as error:  # decoders raise many types of exceptions for broken files
        raise ImageRefused(Reason.IMAGE_BROKEN, _describe(error)) from error


def to_rgb(image: Image.Image, limits: Limits) -> Image.Image:
    """Convert what Pillow has opened or made to RGB, by policy ``rgb-1``, as ``decode`` its encoded bytes.

    What ``decode`` returns stays as it is. The orientation is that of the image's EXIF, which copies of Pillow keep.
    Pillow states the transparent colour of a PNG in the samples of its file: it is scaled to 8 bits in the image, too.
    One of 2 or 4 bits is known only before the pixels are loaded. Raises ImageRefused.
    """
    try:
        _check_size(image.size, limits)
        # Bits of a sample of the file, as far as they decide its transparent colour: 8 if they are not known.
        modes = {"L;2": 2, "L;4": 4, "RGB;16B": 16}
        raw = [modes[tile[3]] for tile in getattr(image, "tile", []) if tile[3] in modes]
        colour = image.info.get("transparency")
        large = isinstance(colour, tuple) and max(colour) > 255
        depth = next(iter(raw), 16 if large else 8)
        image.load()
        return _apply_orientation(_to_rgb(image, depth), image)
    except ImageRefused:
        raise
    except Exception as error:  # as in decode
        raise ImageRefused(Reason.IMAGE_BROKEN, _describe(error)) from error


def check_header(data: bytes, limits: Limits) -> tuple[int, int]:
    """Return width and height by an image's header. Nothing is decoded.

    Raises ImageRefused for a format that is not supported, and for a size above the limits.
    """
    try:
        size = _open(data).size
        _check_size(size, limits)
    except ImageRefused:
        raise
    except Exception as error:  # as in decode
        raise ImageRefused(Reason.IMAGE_BROKEN, _describe(error)) from error
    return size


def is_plain(data: bytes) -> bool:
    """Whether the header shows that policies ``rgb-1`` and ``pillow-rgb-1`` give the same pixels of an image.

    False where the header does not show it. A PNG may be decoded, because its orientation can follow its pixels.
    """
    try:
        image = _open(data)
        if image.format not in _PLAIN_FORMATS or image.mode not in _PLAIN_MODES or "transparency" in image.info:
            return False
        return image.getexif().get(_EXIF_ORIENTATION, 1) == 1
    except Exception:  # as in decode
        return False


def format_extension(data: bytes) -> str:
    """The usual extension of an image's format, by its content. Raises ImageRefused."""
    name = _open(data).format or ""
    return {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", _HEIF: "heic"}.get(name, name.lower())


def check_decoder(data: bytes) -> None:
    """Raise ImageRefused for a HEIC if its decoder is not installed."""
    if is_heic(data) and not reads_heic():
        raise ImageRefused(Reason.IMAGE_FORMAT, HEIC_HINT)


def _load(data: bytes) -> Image.Image:
    image = _open(data)
    image.load()
    return image


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # AVIF depends on how Pillow was built


def is_heic(data: bytes) -> bool:
    """Whether the brands at the beginning of a file are those of HEVC images; of AVIF, some are the same, too."""
    if data[4:8] != b"ftyp":
        return False
    size = min(int.from_bytes(data[:4], "big"), _BRAND_BYTES, len(data))
    brands = (data[at : at + 4] for at in (8, *range(16, size - 3, 4)))
    return any(brand.startswith(_HEIC_BRANDS) for brand in brands)


@functools.cache
def _register_heif() -> str:
    """Let Pillow open HEIC: in one thread, as the decode processes share cores, and nothing but the primary image."""
    import pillow_heif

    pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)
    return _HEIF


def _open(data: bytes) -> Image.Image:
    """Parse the header like ``Image.open``, but without its process-wide pixel limit: ``limits.pixels`` applies.

    Pillow's WebP and TIFF plugins still refuse more than twice ``Image.MAX_IMAGE_PIXELS``.
    """
    errors = []
    check_decoder(data)
    for name in [*([_register_heif()] if is_heic(data) else []), *_formats()]:
        factory, accept = Image.OPEN[name]
        accepted = accept(data[:16]) if accept else True
        if isinstance(accepted, str):  # Pillow recognizes the format, but was built without its decoder
            raise ImageRefused(Reason.IMAGE_FORMAT, accepted)
        if accepted:
            try:
                return factory(io.BytesIO(data), "")
            except (SyntaxError, IndexError, TypeError, struct.error) as error:  # the plugin does not accept it
                errors.append(f"{name}: {error}")
    if errors:
        raise ImageRefused(Reason.IMAGE_BROKEN, "; ".join(errors)[:200])
    raise ImageRefused(Reason.IMAGE_FORMAT, f"no known format, begins with {data[:8]!r}" if data else "no data")


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageRefused(Reason.IMAGE_BROKEN, f"{width}x{height} pixels")
    if width * height > limits.pixels:
        raise ImageRefused(Reason.IMAGE_PIXELS, f"{width}x{height} pixels, above limits.pixels of {limits.pixels}")
    if max(size) > limits.aspect * min(size):
        raise ImageRefused(Reason.IMAGE_ASPECT, f"{width}x{height} pixels, above limits.aspect of {limits.aspect:g}")


def _check_complete(image: Image.Image, data: bytes, strict: bool) -> None:
    """Refuse a loaded image whose missing pixels Pillow has filled in without an error."""
    if image.format == "PNG":
        if missing := jpeg.missing_bytes(image, data):
            raise ImageRefused(Reason.IMAGE_BROKEN, f"the PNG lacks {missing} bytes of pixel data")
        if strict and (fault := jpeg.damage(data)):
            raise ImageRefused(Reason.IMAGE_BROKEN, fault)
    elif strict and image.format == _HEIF and data.endswith(_ZEROS):
        raise ImageRefused(Reason.IMAGE_BROKEN, f"the HEIC ends in {len(_ZEROS):,} zeros or more")
    elif strict and image.format in _JPEGS:
        if jpeg.ends_in_zeros(data):
            raise ImageRefused(Reason.IMAGE_BROKEN, "the JPEG ends in zeros, without an end mark")
        if jpeg.lacks_scan_data(image, data, _load):
            raise ImageRefused(Reason.IMAGE_BROKEN, "the JPEG lacks scan data")


def _to_rgb(image: Image.Image, depth: int) -> Image.Image:
    """Convert a loaded image of any mode to RGB, over white; ``depth`` is the bits of a sample of its file."""
    if image.mode == "F" or image.mode.startswith("I"):
        # Grey of more than 8 bits.
        grey = Image.new("L", image.size)
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # 16-bit values
            transparency = image.info.get("transparency")
            for top, pixels in _pixels(image):
                values = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
                if isinstance(transparency, int):
                    values[pixels == transparency] = 255
                grey.paste(Image.fromarray(values), (0, top))
        else:
            maximum = max(float(pixels.max(where=np.isfinite(pixels), initial=0)) for _, pixels in _pixels(image))
            ceilings = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
            level = next((ceiling for ceiling in ceilings if maximum <= ceiling), maximum)  # of white
            for top, pixels in _pixels(image):
                scaled = np.nan_to_num(pixels.astype(np.float64), nan=0.0, posinf=level, neginf=0.0) * (255 / level)
                grey.paste(Image.fromarray(scaled.clip(0, 255).round().astype(np.uint8)), (0, top))
        return grey.convert("RGB")
    transparency = image.info.get("transparency")
    if image.mode == "La":  # Pillow converts premultiplied grey only to LA
        image = image.convert("LA")
    if transparency is None and image.mode not in ("LA", "PA", "RGBA", "RGBa"):
        return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy
    if transparency is not None and depth != 8 and image.mode in ("L", "RGB"):
        # The transparent colour of a PNG, in the 8 bits that Pillow decodes pixels to.
        if isinstance(transparency, tuple):
            transparency = tuple(sample >> 8 if depth == 16 else sample for sample in transparency)
        else:
            transparency = transparency * 255 // (2**depth - 1)
        image.info["transparency"] = transparency
    white = Image.new("RGB", image.size, _WHITE)
    for top, strip in _strips(image):
        rgba = strip.convert("RGBA")
        white.paste(rgba, (0, top), mask=rgba.getchannel("A"))
    return white


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield (first row, strip) for a few rows at a time, which bounds the memory of intermediate copies."""
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _pixels(image: Image.Image) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first row, pixels) strip by strip."""
    return ((top, np.asarray(strip)) for top, strip in _strips(image))


def _apply_orientation(rgb: Image.Image, original: Image.Image) -> Image.Image:
    try:
        orientation = original.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # broken EXIF data is ignored
        return rgb
    method = _TRANSPOSE_BY_ORIENTATION.get(orientation) if isinstance(orientation, int) else None
    return rgb if method is None else rgb.transpose(method)


def _plain(rgb: Image.Image) -> Image.Image:
    """The pixels without what states how they are to be shown: the policy has applied it."""
    plain = rgb._new(rgb.im)
    plain.info = {}
    return plain


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200].encode("utf-8", "replace").decode()
