"""Refusals of a lease: samples, rows of a layer, or the shard as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Set

from reinforce.dataset.files.store import Store
from reinforce.engine.messages.tracebacks import shorten
from reinforce.source.samples import Refusal
from schemas import WHOLE_SHARD

_EXAMPLE_CHARS = 300


class Refusals:
    """Refusals by layer, kept until they are written to the quarantine.

    ``shard_reason`` is the reason for which the shard as a whole is refused, or None. ``cleaned`` counts the captions
    that the rules of ``clean`` have changed or dropped, by captioner and rule.
    """

    def __init__(self) -> None:
        self.shard_reason: str | None = None
        self.cleaned: dict[str, Counter[str]] = {}
        self._by_layer: dict[str, list[Refusal]] = {}

    def add(self, layer: str, refusal: Refusal) -> None:
        self._by_layer.setdefault(layer, []).append(refusal)
        if refusal.key is None and refusal.reason.value in WHOLE_SHARD:
            self.shard_reason = refusal.reason.value

    @property
    def layers(self) -> Set[str]:
        """The layers that refuse something."""
        return self._by_layer.keys()

    def count_cleaned(self, captioner: str, counts: Mapping[str, int]) -> None:
        """Add what ``clean`` has done to the captions of one image."""
        self.cleaned.setdefault(captioner, Counter()).update(counts)

    def counts(self) -> dict[str, int]:
        return dict(Counter(refusal.reason.value for rows in self._by_layer.values() for refusal in rows))

    @property
    def samples(self) -> int:
        """Number of samples that are refused in any layer."""
        return len({row.key for rows in self._by_layer.values() for row in rows} - {None})

    def examples(self, redact: Callable[[str], str]) -> dict[str, str]:
        """Key and detail of the first refusal of each reason, in one line; ``redact`` removes secrets from details."""
        first: dict[str, str] = {}
        for row in (row for rows in self._by_layer.values() for row in rows):
            if row.reason.value not in first:
                text = redact(row.detail) if row.key is None else f"{row.key}: {redact(row.detail)}"
                first[row.reason.value] = shorten(" ".join(text.split()), _EXAMPLE_CHARS)
        return first

    def write(self, store: Store, shard: str, redact: Callable[[str], str]) -> None:
        """Write the quarantine files of a shard; ``redact`` removes secrets from details."""
        for layer, rows in self._by_layer.items():
            store.quarantine(layer, shard, [(row.key, row.reason, redact(row.detail)) for row in rows])
