"""The pyarrow schema of every Parquet file that is written, with its version, and the quarantine reasons. No logic.

Every field has a ``description`` in its metadata. Readers refuse files of a higher ``SCHEMA_VERSION``. All layers of a
shard have the same rows in the same order and the same row groups; each repeats ``key``, so that readers can check the
alignment.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import pyarrow as pa

SCHEMA_VERSION = 1


def _field(name: str, type_: pa.DataType, description: str, nullable: bool = True) -> pa.Field:
    return pa.field(name, type_, nullable=nullable, metadata={"description": description})


_TEXTS = pa.list_(pa.field("element", pa.string(), nullable=False))
_KEY = _field("key", pa.string(), "the sample's key in its source shard, as webdataset forms it", nullable=False)

CROP = pa.struct(
    [
        _field("top", pa.int32(), "first row of the crop, in pixels of the RGB image", nullable=False),
        _field("left", pa.int32(), "first column of the crop, in pixels of the RGB image", nullable=False),
        _field("height", pa.int32(), "rows of the crop", nullable=False),
        _field("width", pa.int32(), "columns of the crop", nullable=False),
    ]
)
OP = pa.struct(
    [
        _field("name", pa.string(), "RandAugment operation, by torchvision's name", nullable=False),
        _field("magnitude", pa.float32(), "signed; TranslateX/Y in pixels at `size`", nullable=False),
    ]
)
#: One augmentation record: crop, bicubic resize to (size, size), then ``ops`` in order. ``ops`` is null if RandAugment
#: was skipped.
AUGMENTATION = pa.struct(
    [
        _field("crop", CROP, "RandomResizedCrop's box", nullable=False),
        _field("size", pa.int32(), "side in pixels of the square the crop was resized to", nullable=False),
        _field("ops", pa.list_(pa.field("element", OP, nullable=False)), "RandAugment's operations in order"),
    ]
)


def image_column(images: str) -> str:
    """Column of a samples layer that holds the images: ``image`` (``embed``) or ``image_ref`` (``reference``).

    The samples of published labels (``none``) have neither.
    """
    return "image" if images == "embed" else "image_ref"


#: Column of the digests of images that are stored by reference.
IMAGE_DIGEST = "image_digest"


def image_columns(images: str) -> tuple[str, ...]:
    """Columns of a samples layer from which images are read: that of ``image_column``, and of references the digest."""
    if images == "none":
        return ()
    return (image_column(images),) if images == "embed" else (image_column(images), IMAGE_DIGEST)


#: Columns of the samples of published labels that identify the image of a row.
IDENTITIES = ("uid", "sha256", IMAGE_DIGEST, "url")

#: Column of a samples layer with several true captions of a sample; most datasets do not have it.
TRUE_CAPTIONS = "true_captions"


#: Column of a samples layer whose augmentation records are of published labels.
LABELLED = "labelled"


def samples_schema(images: str, true_captions: bool = False, labels: bool = False) -> pa.Schema:
    """Schema of ``samples/<shard>.parquet``; ``images`` is ``embed``, ``reference``, or ``none`` of published labels.

    ``true_captions``: with a column of all true captions of a sample. ``labels``: with a column of how its published
    labels were found.
    """
    several = [_field(TRUE_CAPTIONS, _TEXTS, "all, `caption` the first; only with `input.captions_per_sample`", False)]
    fields = [
        _KEY,
        _field("caption", pa.string(), "the true caption after the caption policy; null where there is none"),
        *several[: int(true_captions)],
        _field("metadata", pa.string(), "the json sidecar or its chosen fields, as JSON text"),
        _field("width", pa.int32(), "of the RGB image (orientation applied), in pixels", nullable=False),
        _field("height", pa.int32(), "of the RGB image (orientation applied), in pixels", nullable=False),
    ]
    if images == "none":
        uid, sha256, digest, url = IDENTITIES
        fields += [
            _field(uid, pa.string(), "uid of the sample in the data set that it is from"),
            _field(sha256, pa.string(), "SHA-256 of the file as it was downloaded, in hex digits"),
            _field(digest, pa.uint64(), "BLAKE2b-64 of the encoded image that was labelled, little-endian"),
            _field(url, pa.string(), "where the image was downloaded from"),
        ]
    elif image_column(images) == "image":
        fields.append(_field("image", pa.binary(), "the encoded image as it stood in the source", nullable=False))
    else:
        reference = pa.struct(
            [
                _field("url", pa.string(), "the uncompressed tar that holds the image", nullable=False),
                _field("offset", pa.int64(), "first byte of the encoded image in it", nullable=False),
                _field("length", pa.int64(), "bytes of the encoded image", nullable=False),
            ]
        )
        fields.append(_field("image_ref", reference, "where the encoded image lies", nullable=False))
        fields.append(_field(IMAGE_DIGEST, pa.uint64(), "BLAKE2b-64 of the encoded image, little-endian"))
    fields.append(
        _field(
            "augmentations",
            pa.list_(pa.field("element", AUGMENTATION, nullable=False)),
            "K augmentation records; embedding k of a teacher's images belongs to record k",
            nullable=False,
        )
    )
    joined = (
        "what joined `augmentations` with the sample, and the size that they are scaled from; null where they are own"
    )
    return pa.schema([*fields, *[_field(LABELLED, pa.string(), joined)][: int(labels)]])


#: Schema of ``identities/<fingerprint>/<kind>/<number>.parquet``, sorted by hash.
IDENTITIES_SCHEMA = pa.schema(
    [
        _field("hash", pa.uint64(), "of a digest itself, of others BLAKE2b-64 of the text", nullable=False),
        _field("shard_number", pa.int32(), "place of the shard in shards.parquet", nullable=False),
        _field("row", pa.int32(), "row of the shard, over all of its row groups", nullable=False),
    ]
)


#: Schema of ``captions/<captioner>/<shard>.parquet``.
CAPTIONS_SCHEMA = pa.schema([_KEY, _field("captions", pa.list_(pa.string()), "N synthetic captions of the image")])


def embeddings_schema(count: int, dim: int, dtype: str) -> pa.Schema:
    """Schema of ``embeddings/<teacher>/<what>/<shard>.parquet``: per row, [count, dim] unit-norm vectors.

    ``dtype`` is ``float16``, ``float32`` or ``int8``. With int8, vector j is ``embeddings[j] * scales[j]``. With
    ``uint8``, a vector is a code of ``dim`` bytes, which a codebook decodes.
    """
    value = {"float16": pa.float16(), "float32": pa.float32(), "int8": pa.int8(), "uint8": pa.uint8()}[dtype]
    text = "codes of unit-norm vectors" if dtype == "uint8" else "unit-norm vectors"
    scales = ("scales", pa.float32(), [count], "vector j = embeddings[j] * scales[j]")
    return tensors_schema(
        ("embeddings", value, [count, dim], f"{text}, one a row of the tensor"),
        *[scales][: int(dtype == "int8")],
    )


def tensors_schema(*columns: tuple[str, pa.DataType, Sequence[int], str]) -> pa.Schema:
    """Schema of files with a key and tensors in each row: the name, type, shape and description of each column."""
    fields = [_field(name, pa.fixed_shape_tensor(type_, [*shape]), text) for name, type_, shape, text in columns]
    return pa.schema([_KEY, *fields])


def scores_schema(names: Sequence[str]) -> pa.Schema:
    """Schema of ``scores/<name>/<shard>.parquet``: a struct of scores by name."""
    scores = pa.struct([pa.field(name, pa.float32()) for name in names])
    description = "of the sample; one is null where a value that it is computed from is null"
    return pa.schema([_KEY, _field("scores", scores, description, nullable=False)])


_reason = "number and name of the rule that leaves the sample out; null where it is kept"
_values = "by which each rule `keep` without `within` decides, in the order of the rules; NaN where there is none"
_lists = _field("values", pa.list_(pa.float32()), _values, nullable=False)
#: Schema of ``views/<name>/rows-<fingerprint>/<shard>.parquet``: a row for each sample, in their order.
VIEW_SCHEMA = pa.schema([_KEY, _field("left_out", pa.string(), _reason), _lists])


#: Schema of ``views/<name>/shards-<fingerprint>.parquet``, sorted by shard.
VIEW_SHARDS_SCHEMA = pa.schema(
    [
        _field("shard", pa.string(), "name of the shard", nullable=False),
        _field("rows", pa.int64(), "samples of the shard", nullable=False),
        _field("kept", pa.list_(pa.int32()), "samples of each row group that the view keeps", nullable=False),
        _field("content", pa.uint64(), "digest of what the rules read of the shard", nullable=False),
        _field("state", pa.int64(), "hash of sizes and times of these files; 0: unknown", nullable=False),
        _field("digest", pa.uint64(), "digest of the file that has the rows of the shard", nullable=False),
    ]
)


#: Schema of ``quarantine/<layer>/<shard>.parquet``.
QUARANTINE_SCHEMA = pa.schema(
    [
        _field("key", pa.string(), "the sample's key; null for the shard as a whole"),
        _field("reason", pa.string(), "one of schemas.Reason", nullable=False),
        _field("detail", pa.string(), "what was found, for people", nullable=False),
    ]
)


#: Schema of ``index/<layer>.parquet``: what was committed, one row per file of the layer, sorted by shard.
INDEX_SCHEMA = pa.schema(
    [
        _field("shard", pa.string(), "name of the shard", nullable=False),
        _field("size", pa.int64(), "bytes of the file when it was committed", nullable=False),
        _field("rows", pa.int64(), "rows of the file", nullable=False),
        _field("groups", pa.list_(pa.int32()), "rows of each of its row groups; null except in samples"),
    ]
)


#: Schema of ``held-out.parquet``, the held-out images of a captioner's training: one row per image, in the order in
#: which they are evaluated. The file's metadata contains the ``fingerprint`` of their source.
HELD_OUT = pa.schema(
    [
        _field("key", pa.string(), "the sample's key in its shard, as webdataset forms it", False),
        _field("captions", _TEXTS, "the image's captions after the caption policy, at least one", False),
        _field("image", pa.binary(), "the encoded image as it is in the source", False),
    ]
)


class Reason(str, Enum):
    """Reasons of quarantine: a fixed set, so that reports can count. The quarantine files have the values."""

    # A sample is refused while its shard is read. It is in no layer.
    NO_IMAGE = "no_image"  # the sample has no image, or published reinforcements have no image in the source
    IMAGE_MISSING = "image_missing"  # there is no file that can be read where the source says that the image is
    IMAGE_PLACE = "image_place"  # the source names a place of the image that is not allowed
    NOT_REINFORCED = "not_reinforced"  # the published reinforcements do not contain this key
    REINFORCEMENT_BROKEN = "reinforcement_broken"  # published reinforcements are unreadable or of another image
    DUPLICATE_KEY = "duplicate_key"  # the shard already contained this key, or this member of it
    SPLIT_KEY = "split_key"  # members of a key that are not adjacent to its other members
    ROW_BROKEN = "row_broken"  # a row of a table that cannot be read
    KEY_CHARS = "key_chars"  # the key is longer than limits.key_chars
    IMAGE_BYTES = "image_bytes"  # the encoded image is larger than limits.image_bytes
    IMAGE_PIXELS = "image_pixels"  # more pixels than limits.pixels by the image's header; it is not decoded
    IMAGE_ASPECT = "image_aspect"  # longer side / shorter side is above limits.aspect
    IMAGE_SCANS = "image_scans"  # a progressive JPEG with more scans than limits.scans
    IMAGE_FORMAT = "image_format"  # not an image of a supported format
    IMAGE_BROKEN = "image_broken"  # the image is truncated or corrupt
    IMAGE_CRASHED = "image_crashed"  # every attempt to decode the image has crashed its decode process
    IMAGE_HUNG = "image_hung"  # every attempt to decode the image took longer than failures.sample_seconds
    # A part of a sample is left out. Its row is stored.
    SIDECAR_BYTES = "sidecar_bytes"  # a caption or json member is larger than limits.sidecar_bytes
    SIDECAR_BROKEN = "sidecar_broken"  # a json member is not a JSON object, or a member is a link or unreadable
    MEMBERS = "members"  # the sample has more members than limits.members
    STRAY_MEMBERS = "stray_members"  # the sample has several images; all but one, and their captions, are not read
    # A row that one layer cannot compute. It is null in that layer and complete in the others.
    NO_TEXT = "no_text"  # there is no caption to encode, or a captioner gave none
    NOT_FINITE = "not_finite"  # the model returned NaN or infinity
    ZERO_VECTOR = "zero_vector"  # the numbers of a vector that the codec stores are all zero
    # Labels of a shard. The key is null, and the rows whose labels are in the file are null in their layers.
    LABELS_UNREAD = "labels_unread"  # a file of labels does not exist or cannot be read
    # A shard as a whole. The key is null.
    SHARD_MISSING = "shard_missing"  # the URL does not exist
    SHARD_UNREADABLE = "shard_unreadable"  # the shard exists but cannot be read: not a tar, or no permission
    SHARD_DAMAGED = "shard_damaged"  # the shard is damaged at a byte offset; samples before and after it are kept
    SHARD_SAMPLES = "shard_samples"  # more samples than limits.shard_samples; the first ones are kept
    SHARD_UNSORTED = "shard_unsorted"  # the members of most samples are not adjacent
    SHARD_FAILED = "shard_failed"  # every attempt raised an error
    SHARD_CRASHED = "shard_crashed"  # every attempt that ran alone in its worker killed the process
    SHARD_HUNG = "shard_hung"  # every attempt that ran alone in its worker made no progress


#: Reasons for which a shard has no file in a layer. A damaged shard has a file with its readable samples.
WHOLE_SHARD = frozenset(
    reason.value
    for reason in (
        Reason.SHARD_MISSING,
        Reason.SHARD_UNREADABLE,
        Reason.SHARD_UNSORTED,
        Reason.SHARD_FAILED,
        Reason.SHARD_CRASHED,
        Reason.SHARD_HUNG,
    )
)
