"""Reasons why a sample, a part of one, a row or a shard is quarantined. A fixed set, so that reports can count."""

from __future__ import annotations

from enum import Enum


class Reason(str, Enum):
    """Reasons of quarantine. The values are stored in the quarantine files."""

    # A sample is refused while its shard is read. It is in no layer.
    NO_IMAGE = "no_image"  # the sample has no image, or published reinforcements have no image in the source
    IMAGE_MISSING = "image_missing"  # there is no file where the source says that the image is
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
    SIDECAR_BROKEN = "sidecar_broken"  # a json member is not a JSON object, or a member is a link
    MEMBERS = "members"  # the sample has more members than limits.members
    STRAY_MEMBERS = "stray_members"  # the sample has several images; all but one, and their captions, are not read
    # A row that one layer cannot compute. It is null in that layer and complete in the others.
    NO_TEXT = "no_text"  # there is no caption to encode, or a captioner gave none
    NOT_FINITE = "not_finite"  # the model returned NaN or infinity
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
