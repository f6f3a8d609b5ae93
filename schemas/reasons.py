"""Why a sample or a shard is in quarantine: a small fixed vocabulary, so that reports can count."""

from __future__ import annotations

from enum import Enum


class Reason(str, Enum):
    """Reasons of refusal. The value is what stands in the quarantine files."""

    # a sample, refused while reading: it is in no layer
    NO_IMAGE = "no_image"  # members of a key without an image among them, or published reinforcements without one
    NOT_REINFORCED = "not_reinforced"  # no published reinforcements of this key
    REINFORCEMENT_BROKEN = "reinforcement_broken"  # published ones that cannot be read, or are not of this image
    DUPLICATE_KEY = "duplicate_key"  # the key, or a member of it, occurred before in the same shard
    SPLIT_KEY = "split_key"  # members of a key that are not beside its others
    KEY_CHARS = "key_chars"  # key longer than limits.key_chars
    IMAGE_BYTES = "image_bytes"  # encoded image larger than limits.image_bytes
    IMAGE_PIXELS = "image_pixels"  # more pixels than limits.pixels, told by the header, not decoded
    IMAGE_ASPECT = "image_aspect"  # longer side / shorter side above limits.aspect
    IMAGE_SCANS = "image_scans"  # a progressive JPEG with more scans than limits.scans
    IMAGE_FORMAT = "image_format"  # not an image in a format that is read
    IMAGE_BROKEN = "image_broken"  # truncated or corrupt
    # a part of a sample that was left out; the row is there
    SIDECAR_BYTES = "sidecar_bytes"  # a caption or json member larger than limits.sidecar_bytes
    SIDECAR_BROKEN = "sidecar_broken"  # a json member that is no JSON object, or a member that is a link
    MEMBERS = "members"  # more members than limits.members
    # a row that a layer cannot serve: null there, whole elsewhere
    NO_TEXT = "no_text"  # no caption to encode
    NOT_FINITE = "not_finite"  # the model gave NaN or infinity
    # a shard as a whole (key is null)
    SHARD_MISSING = "shard_missing"  # the URL does not exist
    SHARD_UNREADABLE = "shard_unreadable"  # it exists and cannot be read: no tar, no permission
    SHARD_DAMAGED = "shard_damaged"  # broken at a byte; the rows before it and behind it are kept
    SHARD_SAMPLES = "shard_samples"  # more samples than limits.shard_samples; the first ones are kept
    SHARD_UNSORTED = "shard_unsorted"  # members of most samples are not side by side
    SHARD_FAILED = "shard_failed"  # raised at every attempt
    SHARD_CRASHED = "shard_crashed"  # killed its process alone at every attempt
    SHARD_HUNG = "shard_hung"  # stood still alone at every attempt, at the sample that is named


#: Reasons for which a shard has no file in a layer; a damaged one has a file with the rows beside the damage.
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
