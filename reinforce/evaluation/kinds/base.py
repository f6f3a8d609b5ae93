"""The interface of a kind of evaluation sets: sets of users by their config, published sets by their files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from reinforce.evaluation.images import ImageBatches
from reinforce.evaluation.kinds.files import SetFiles
from reinforce.evaluation.reading import SetReader, Table
from reinforce.evaluation.registry import SuiteSet
from reinforce.evaluation.report import Outcome
from reinforce.images.policy import IMAGE_POLICY
from reinforce.settings import Section

if TYPE_CHECKING:
    from reinforce.evaluation.encoding import Models


@dataclass(frozen=True)
class ImageSet:
    """A set that models can be evaluated on, with its name in messages.

    ``score`` gives the metrics of models on the images of ``examples``; none if no example can be used. ``count`` is
    the number of examples, with those that are refused, or 0 where it is not known before they are read. ``policy`` is
    the image policy of a set of the user.
    """

    name: str
    examples: SetReader
    score: Callable[[Models, ImageBatches], Outcome]
    count: int = 0
    policy: str = IMAGE_POLICY
    parts: Any = None  # of a set with a `source`: what another set of this source is opened with


class OwnSet(Section):
    """The config of a set of the user."""

    @property
    def source(self) -> str | None:
        """Sets of one source have the same images and targets, and are encoded once; None: of no other set."""
        return None

    @property
    def scores(self) -> list[str]:
        """Names of the metrics, in order; all are between 0 and 1, and higher is better."""
        raise NotImplementedError

    @property
    def size(self) -> int | None:
        """Images at most, or None where this is not known before the set is opened."""
        raise NotImplementedError


class SetSource(Table):
    """Where the images of a set, or of a part of one, are."""

    limit: int | None = Field(None, ge=1, description="images to use, the first ones")

    @property
    def size(self) -> int | None:
        return self.limit


@dataclass(frozen=True)
class SetKind:
    """A kind of sets: its ``name`` in sets.csv, and ``open``, for a published set; None if no suite has such sets.

    Increase ``version`` with a change of the metrics after which a kept result would be another. If users have sets of
    the kind, ``section`` is the one of a config that has them by name, and ``open_own`` checks such a set and counts
    its images. Its arguments are the config of the set, its name in messages, limits, the folders from which images
    that are stored by reference may be read, and a set of the same source, if one is open.
    """

    name: str
    open: Callable[[SuiteSet, SetFiles], ImageSet] | None
    version: int = 1
    section: str = ""
    open_own: Callable[..., ImageSet] | None = None
