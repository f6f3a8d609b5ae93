"""Which images the rows of a decoder hold: rows whose texts have ended are replaced by the next images of the batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
#: Images enter when at least 1 / _SHARE of the places are free, since entering is estimated at the time of a step.
_SHARE = 16


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
    when all of them have ended.
    """

    def __init__(self, images: int, captions: int, rows: int, places: int) -> None:
        self.waiting, self.longest = images, 0  # images to come, and the tokens of the longest text
        self._images, self._captions, self._places = images, captions, places
        self._place_of = np.full(rows, places)
        self._tokens = np.zeros(rows, np.int64)

    def advance(self, ended: npt.NDArray[np.bool_]) -> None:
        """Count a step, after which the texts of these rows, bool [rows], have ended."""
        if not self.waiting:  # nobody enters any more, and rows may move
            self.longest += 1
            return
        self._tokens += 1
        self._place_of[ended], self._tokens[ended] = self._places, 0
        self.longest = int(self._tokens.max())

    def enter(self) -> Entry | None:
        """The images that enter before the next step."""
        if not self.waiting:
            return None
        free = np.flatnonzero(self._place_of == self._places)
        places = np.setdiff1d(np.arange(self._places), self._place_of)
        count = min(self.waiting, len(places), len(free) // self._captions)
        if not count or (count < min(self.waiting, self._places // _SHARE) and len(free) < len(self._place_of)):
            return None
        images = self._images - self.waiting + np.arange(count)
        places, rows = places[:count], free[: count * self._captions]
        captions = images[:, None] * self._captions + np.arange(self._captions)
        self._place_of[rows], self._tokens[rows] = places.repeat(self._captions), 0
        self.waiting -= count
        return Entry(images, places, rows, captions.reshape(-1), self._place_of.copy())
