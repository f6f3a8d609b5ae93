"""A source shard to compute, as the driver sends it to a worker."""

from __future__ import annotations

from dataclasses import dataclass, field

from reinforce.input_config import DEFAULT
from reinforce.source.formats.base import Part, Shard
from reinforce.source.formats.recognise import find_format
from reinforce.source.identity import SourceState


@dataclass(frozen=True, slots=True)
class PendingShard:
    """A source shard and its missing layers, each after the layers it needs.

    ``stored`` are layers that exist although samples are missing, also of other configs, and ``recorded`` is the state
    of the source file when its samples were written before, if a run has recorded it. ``quarantined`` are layers that
    may have a quarantine file of an earlier attempt. ``replaced`` are layers whose files are set aside before others
    are committed, each before those that it was computed from.
    """

    name: str
    url: str
    layers: tuple[str, ...]
    reinforcements: str | None = None  # URL of its published reinforcements, if a missing layer reads them
    stored: tuple[str, ...] = ()
    recorded: SourceState | None = None
    format: str = DEFAULT
    listing: str = ""  # URL of the list of its files
    part: Part | None = None  # of a table that is divided
    quarantined: tuple[str, ...] = field(default=(), compare=False)
    replaced: tuple[str, ...] = ()

    @property
    def source(self) -> Shard:
        return Shard(self.url, self.name, self.format, self.listing, self.part)

    @property
    def is_file(self) -> bool:
        """Whether its URL is that of a file, which it has all samples of."""
        return self.part is None and not find_format(self.format).is_listed
