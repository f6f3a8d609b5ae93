"""Which images the rows of a decoder hold: rows whose texts have ended are replaced by the next images of the batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
#: Images enter when at least 1 / _SHARE of the places are free, since entering is estimated at the time of a step.
_SHARE = 16


def entry_size(places: int) -> int:
    """Images that enter so many places at once, or a multiple, while others hold some of the places."""
    return max(1, places // _SHARE)


@dataclass(frozen=True)
class Entry:
    """Images that enter a decoder.

    Attributes:
        images: indices of the images in the batch, [n].
        places: their places among the images of the decoder, [n].
        rows: the rows of their captions, [n * captions].
        captions: indices of these captions in the batch, [n * captions].
        place_of: the place of each row's image from now on, [rows]; the number of places for a row without a text.
    """

    images: Indices
    places: Indices
    rows: Indices
    captions: Indices
    place_of: Indices


class Schedule:
    """Decides by the ends of texts alone, in the order of the images, so that equal batches have equal steps.

    The decoder has so many ``rows`` and ``places`` for images. An image enters with all of its captions, and leaves
    when all of them have ended. Steps may be launched before the ends of texts in an earlier one are known.
    """

    def __init__(self, images: int, captions: int, rows: int, places: int) -> None:
        self.waiting, self.longest = images, 0  # images to come, and the most tokens of a text that may not have ended
        self._images, self._captions, self._places = images, captions, places
        self._place_of = np.full(rows, places)
        self._tokens = np.zeros(rows, np.int64)
        self._first = np.zeros(rows, np.int64)  # the step in which a row's text begins
        self._launched = self._known = 0  # steps, and those whose ends are known

    def launch(self) -> None:
        """Count a step that is launched."""
        self._launched += 1
        self._tokens += 1
        self.longest += 1

    def advance(self, ended: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Take in the ends of the next step: the rows whose texts have ended, bool [rows] -> those of present texts."""
        ended = ended & (self._first[: len(ended)] <= self._known)
        self._known += 1
        if self.waiting:  # else no image enters later, and rows may move
            self._place_of[ended], self._tokens[ended] = self._places, 0
            self.longest = int(self._tokens.max())
        return ended

    def enter(self) -> Entry | None:
        """The images that enter before the next step."""
        if not self.waiting:
            return None
        free = np.flatnonzero(self._place_of == self._places)
        places = np.setdiff1d(np.arange(self._places), self._place_of)
        count, size = min(self.waiting, len(places), len(free) // self._captions), entry_size(self._places)
        if count < self.waiting and len(free) < len(self._place_of):
            count -= count % size
        if not count:
            return None
        images = self._images - self.waiting + np.arange(count)
        places, rows = places[:count], free[: count * self._captions]
        captions = images[:, None] * self._captions + np.arange(self._captions)
        self._place_of[rows], self._tokens[rows] = places.repeat(self._captions), 0
        self._first[rows] = self._launched
        self.waiting -= count
        return Entry(images, places, rows, captions.reshape(-1), self._place_of.copy())
