"""Images in files of their own, at the paths and URLs that a table or a folder names.

Paths are relative to the folder of the table and stay in it; what is not there is looked for in the folders that
``input.images_from`` names. Everything else is read only where it is in one of these, except http and https URLs of
public addresses.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator

from reinforce.input_config import Input
from reinforce.source.formats.columns import make_sample
from reinforce.source.linked_images.http import ImageRefusedByPlace, Unreachable, fetch
from reinforce.source.references import MAX_URL_CHARS, ImageRoots
from reinforce.source.samples import Item, RawSample, Refusal, UnreadSample
from reinforce.source.streams import FileReader, UnreadableFile, read_ahead
from reinforce.source.urls import canonical
from schemas import Reason

_FIRST_UNREACHABLE = 20  # unreachable images at the start of a shard after which the shard fails
_NOT_IN_PLACES = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_WEB = ("http://", "https://")


class Places:
    """Reads images at places that a table at ``table`` names; ``table`` is the URL of a file in its folder."""

    def __init__(self, table: str, spec: Input) -> None:
        self._limits = spec.limits
        self.folder = table.rpartition("/")[0]
        self._roots = ImageRoots.named(spec.images_from or (), 'input.images_from: ["{}"]')
        files = {root: FileReader(tuple) for root in self._roots.urls}
        self._files = {self.folder: FileReader(lambda: [table]), **files}
        self._reached = self._unreachable = 0

    def samples(self, items: Iterable[Item]) -> Iterator[RawSample | Refusal]:
        """Yield the items in order, those at places with their images, which are read ahead in threads.

        Raises the storage's errors, and ConnectionError if none of the first images can be reached.
        """
        return read_ahead(self._read, items, self.folder)

    def resolve(self, location: str) -> str:
        """The URL of a place. Raises ImageRefusedByPlace."""
        if len(location) > MAX_URL_CHARS or _NOT_IN_PLACES.search(location) or "::" in location:
            raise ImageRefusedByPlace(Reason.IMAGE_PLACE, "it is no plain path or URL")
        if location.lower().startswith(_WEB):
            return location
        parts = location.split("/")
        if "://" not in location and not location.startswith(("/", "~")) and ".." not in parts and "\\" not in location:
            return f"{self.folder}/{'/'.join(part for part in parts if part not in ('', '.'))}"
        url = location if "://" in location or location.startswith("/") else f"{self.folder}/{location}"
        url = canonical(url)
        if ".." in url.split("/") or not self._roots.holds(url):
            raise ImageRefusedByPlace(
                Reason.IMAGE_PLACE, "it is not in the folder of the table; allow it in input.images_from"
            )
        return url

    def _read(self, item: Item) -> RawSample | Refusal:
        if not isinstance(item, UnreadSample):
            return item
        try:
            url, data = self._found(item.location)
            return make_sample(item, data, self._limits, url)
        except ImageRefusedByPlace as error:
            return Refusal(item.key, error.reason, f"{item.location[:500]!r}: {error.detail}")

    def _found(self, location: str) -> tuple[str, bytes]:
        """The URL of a place, and its content. Raises ImageRefusedByPlace."""
        url = self.resolve(location)
        try:
            return url, self._content(url)
        except ImageRefusedByPlace as error:
            inside = url.startswith(f"{self.folder}/") and "://" not in location and not location.startswith("/")
            if error.reason is not Reason.IMAGE_MISSING or not inside or ".." in location.split("/"):
                raise
            for root in self._roots.urls:
                with contextlib.suppress(ImageRefusedByPlace):
                    found = f"{root}{url.removeprefix(self.folder)}"
                    return found, self._content(found)
            raise

    def _content(self, url: str) -> bytes:
        if url.lower().startswith(_WEB):
            return self._fetched(url)
        limit = self._limits.image_bytes
        files = next(files for root, files in self._files.items() if url == root or url.startswith(f"{root}/"))
        try:
            data = files.read(url, limit)
        except UnreadableFile as error:
            raise ImageRefusedByPlace(Reason.IMAGE_MISSING, str(error)) from error
        if len(data) > limit:
            raise ImageRefusedByPlace(Reason.IMAGE_BYTES, f"more bytes than limits.image_bytes of {limit}")
        return data

    def _is_allowed(self, url: str) -> bool:
        """Whether the config names the folder of a URL, as one of images or by the table in it."""
        place = canonical(url)
        return ".." not in place.split("/") and (self._roots.holds(place) or place.startswith(f"{self.folder}/"))

    def _fetched(self, url: str) -> bytes:
        try:
            data = fetch(url, self._limits.image_bytes, self._is_allowed)
        except Unreachable as error:
            self._unreachable += 1
            if not self._reached and self._unreachable >= _FIRST_UNREACHABLE:
                raise ConnectionError(
                    f"none of the first {self._unreachable} images can be reached: {error}"
                ) from error
            raise ImageRefusedByPlace(Reason.IMAGE_MISSING, str(error)[:500]) from error
        self._reached += 1
        return data
