"""Types of files that are not tars, by name or first bytes, with what the user can do about them."""

from __future__ import annotations

from collections.abc import Iterable

from reinforce.processes.imports import HEIC_HINT, reads_heic

#: The file by which a reinforced dataset is recognised.
MANIFEST = "dataset.json"
#: Tables in a folder of images whose rows belong to its images.
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")

#: Extensions of images, in formats that reinforce.images.policy reads.
IMAGE_EXTENSIONS = frozenset(
    {"jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "tif", "tiff", "avif"}
    | {"pnm", "pbm", "pgm", "ppm"}
)
#: Extensions of images that are read with the extra `heic`.
HEIC_EXTENSIONS = frozenset({"heic", "heif", "hif"})

_PACK = "pack the samples into tars whose members are KEY.jpg and KEY.txt, with `tar --sort=name`"
_IMAGES = "name the folder of the images, or pack images and captions into tars, as KEY.jpg and KEY.txt"
_TABLE = "in `source` of a run, name such files alone or set input.format"
_JSON = "if it has an object on each line, name it .jsonl or set input.format: jsonl"
_ARROW = "write Parquet instead, such as by `datasets.load_from_disk(FOLDER).to_parquet(FILE)`"
_UNPACK = "unpack it, and pack its files with `tar --sort=name`"
_HTML = "it may be the error page of a server; check the URL"
_LFS = "run `git lfs pull` in its repository"
_LIST = "if it lists URLs, name it .txt"
#: The format of a file by its extension, and the fix.
_BY_EXTENSION = {
    "parquet": ("a Parquet file", _TABLE),
    **dict.fromkeys(("arrow", "feather"), ("an Arrow file", _ARROW)),
    **dict.fromkeys(("csv", "tsv"), ("a CSV file", _TABLE)),
    **dict.fromkeys(("json", "jsonl", "ndjson", "jsonlines"), ("a JSON file", _JSON)),
    **dict.fromkeys(("tfrecord", "tfrecords", "h5", "hdf5", "mdb", "npy", "npz"), ("another format", _PACK)),
    **dict.fromkeys(("zip", "7z", "rar"), ("an archive of another format", _UNPACK)),
    **dict.fromkeys(IMAGE_EXTENSIONS | HEIC_EXTENSIONS, ("an image", _IMAGES)),
}
#: The extension of an image by its bytes at an offset.
_IMAGE_MAGIC = (
    (0, b"\xff\xd8\xff", "jpg"),
    (0, b"\x89PNG", "png"),
    (8, b"WEBP", "webp"),
    (0, b"GIF8", "gif"),
    (4, b"ftypavif", "avif"),
    (4, b"ftyphei", "heic"),
    (4, b"ftypmif1", "heic"),
)
#: The same, where text files can start with these bytes.
_SHORT_IMAGE_MAGIC = ((0, b"BM", "bmp"), (0, b"II*", "tif"), (0, b"MM", "tif"), (0, b"P", "pnm"))
#: The format of a file by its bytes at an offset, and the fix.
_BY_CONTENT = (
    *((offset, magic, ("an image", _IMAGES)) for offset, magic, _ in _IMAGE_MAGIC),
    (0, b"PAR1", ("a Parquet file", _TABLE)),
    (0, b"ARROW1", ("an Arrow file", _ARROW)),
    (0, b"PK\x03\x04", ("a zip archive", _UNPACK)),
    (0, b"7z\xbc\xaf", ("a 7z archive", _UNPACK)),
    (0, b"\x93NUMPY", ("a NumPy file", _PACK)),
    (0, b"\x89HDF", ("an HDF5 file", _PACK)),
    (0, b"version https://git-lfs", ("a pointer of Git LFS", _LFS)),
    (0, b"<", ("an HTML or XML page", _HTML)),
    (0, b"{", ("a JSON file", _JSON)),
    (0, b"[", ("a JSON file", _JSON)),
)


def is_image_name(name: str) -> bool:
    """Whether a file name, or an extension of several parts, ends with the extension of an image that is read."""
    extension = name.rpartition(".")[2].lower()
    return extension in IMAGE_EXTENSIONS or (extension in HEIC_EXTENSIONS and reads_heic())


def unread_heic(names: Iterable[str]) -> str | None:
    """What to do about images of which the names state that their decoder is not installed; None if there is none."""
    lacking = not reads_heic() and any(name.rpartition(".")[2].lower() in HEIC_EXTENSIONS for name in names)
    return HEIC_HINT if lacking else None


def image_extension(image: bytes) -> str:
    """The extension of an image's format by its first bytes, for messages."""
    kinds = (*_IMAGE_MAGIC, *_SHORT_IMAGE_MAGIC)
    return next((name for offset, magic, name in kinds if image.startswith(magic, offset)), "image")


def folder_detail(url: str) -> str:
    """Return that the source ``url`` is a folder, and the fix."""
    return f"a folder, not a tar: write {url.rstrip('/')}/*.tar for the tars in it; if it has none, {_IMAGES}"


def foreign_name(url: str) -> str | None:
    """Return the format of a file and the fix, if its extension is not that of a tar."""
    name = url.partition("?")[0].rpartition("/")[2]
    _, dot, extension = name.rpartition(".")
    return _describe(_BY_EXTENSION.get(extension.lower())) if dot else None


def foreign_content(first: bytes) -> str | None:
    """Return the format of a file and the fix, by its first bytes, which are not a tar header; None if unknown."""
    text = first.removeprefix(b"\xef\xbb\xbf").lstrip()
    for offset, magic, kind in _BY_CONTENT:
        if first.startswith(magic, offset) or (magic in (b"<", b"{", b"[") and text.startswith(magic)):
            return _describe(kind)
    is_text = bool(text) and all(byte >= 32 or byte in b"\t\r\n" for byte in first)
    is_utf8 = "\ufffd" not in first.decode("utf-8", "replace")[:-1]  # the last character may be cut off
    return _describe(("a text file", _LIST)) if is_text and is_utf8 else None


def _describe(kind: tuple[str, str] | None) -> str | None:
    return None if kind is None else f"{kind[0]}, not a tar: {kind[1]}"
