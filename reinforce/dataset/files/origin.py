"""What layer files record of their source: the files of a shard belong together if they record the same.

Keys do not show it. An old file that comes back after its source has changed can have the keys of the new samples, and
so can the file of another shard, where the samples of each tar are numbered from 0.
"""

from __future__ import annotations

from collections.abc import Mapping

from reinforce.source.identity import SourceState
from reinforce.terminal import escape

#: Footer entries with digests: of all referenced images; of the images and captions of samples that the state of the
#: source file does not cover, where images are files of their own or the shard is a part of a table. Files of earlier
#: versions do not have them.
IMAGES, LINKED = "images_digest", "linked_digest"
_SOURCE = "source"


def origin_entries(footer: Mapping[str, str]) -> dict[str, str]:
    """What the footer of samples records about their source, for the footers of other layers."""
    digests = {key: footer[key] for key in (IMAGES, LINKED) if key in footer}
    return SourceState.from_footer(footer).footer() | digests


def other_origin(
    samples: Mapping[str, str], footer: Mapping[str, str], recorded: SourceState | None = None
) -> str | None:
    """Why a layer's file is of another source than the samples of its shard, by their footers; None if it is not.

    What one of the two does not record is not compared. ``recorded`` is the state of the source file of a layer's file
    that does not record it.
    """
    source, of_samples = footer.get(_SOURCE), samples.get(_SOURCE)
    if source and of_samples and source != of_samples:
        return f"it is of the source shard {escape(source[:500])}"
    for key, what in ((IMAGES, "images"), (LINKED, "images or captions")):
        if key in samples and key in footer and samples[key] != footer[key]:
            return f"it is of other {what}"
    now, own = SourceState.from_footer(samples), SourceState.from_footer(footer)
    before = own if own.head is not None or recorded is None else recorded
    if before.same_content(now) is False:
        return f"it is of another source file: {before.describe_change(now)}"
    return None
