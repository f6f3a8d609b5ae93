"""Published reinforcements such as DataCompDR and DFNDR: augmentations, captions and vectors for existing images.

A sample of such a tar has ``paug.json`` (augmentation parameters), ``syn.json`` (lists of synthetic captions) and the
vectors of all teachers, concatenated, in ``npz`` or ``pth.gz``. It may have an image or not.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from reinforce.config import Config
from reinforce.datacompdr.matching import KEY, KINDS, UNCONFIRMED, Matcher, describe_counts, identity_of
from reinforce.datacompdr.members import CAPTIONS, PARAMETERS, VECTORS, Unreadable
from reinforce.datacompdr.values import LARGEST_IMAGE, Members, PublishedReader
from reinforce.dataset.layers import SAMPLES, Layer
from reinforce.errors import StorageError, UserError
from reinforce.images.policy import reads_crops
from reinforce.source.formats.base import Shard
from reinforce.source.formats.tar import read_shard
from reinforce.source.reading import read_samples
from reinforce.source.samples import RawSample, ReadBudget, Refusal
from reinforce.source.urls import canonical
from schemas import WHOLE_SHARD, Reason

_CHECKED_SAMPLES = 8
_JOINED_SAMPLES = 32  # of source and reinforcements each, that are joined before a run


class Reinforcements:
    """The published reinforcements of one shard, by key.

    The members are copied to an unnamed temporary file, since the source may have its images in another order.
    ``limit`` bounds the samples. ``refusals`` lists what could not be read of the shard.
    """

    def __init__(self, url: str, config: Config, limit: int | None = None) -> None:
        self._members: dict[str, dict[str, tuple[int, int]]] = {}  # offset and length, by key and name
        self._matcher = Matcher(config.join or "url")
        self._matched: set[str] = set()
        self.refusals: list[Refusal] = []
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        offset = 0
        for item in itertools.islice(read_shard(url, config.input.limits, images=False), limit):
            if isinstance(item, Refusal):
                self.refusals.append(Refusal(item.key, item.reason, f"reinforcements: {item.detail}"))
                continue
            members = self._members[item.key] = {}
            self._matcher.add(item.key, identity_of(item.sidecars))
            for name in (PARAMETERS, CAPTIONS, *VECTORS):
                if name in item.left_out:
                    self.refusals.append(item.left_out[name])
                if (data := item.sidecars.get(name)) is not None:
                    members[name] = (offset, len(data))
                    with _disk_errors():
                        offset += self._file.write(data)
        with _disk_errors():
            self._file.flush()

    @property
    def shard_refusal(self) -> Refusal | None:
        """Why the shard as a whole cannot be read, or None."""
        return next((r for r in self.refusals if r.key is None and r.reason.value in WHOLE_SHARD), None)

    def close(self) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[str]:
        """The keys."""
        return iter(self._members)

    @property
    def counts(self) -> Counter[str]:
        """The samples that were matched by what they were matched by, and those without a match by why."""
        return self._matcher.counts

    def match(self, key: str, sidecars: Mapping[str, bytes]) -> str | Refusal:
        """The key of the reinforcements of a sample with this ``key``, or why it has none."""
        found, why = self._matcher.match(key, identity_of(sidecars))
        if found is None:
            return Refusal(key, Reason.NOT_REINFORCED, f"published reinforcements: {why}")
        self._matched.add(found)
        return found

    def members_of_stored(self, key: str, metadata: str | None) -> dict[str, bytes] | Refusal:
        """The members that belong to a stored sample; these may be others than when it was stored."""
        found = self.match(key, {} if metadata is None else {"json": metadata.encode()})
        return found if isinstance(found, Refusal) else self.members(found)

    def unmatched(self) -> Iterator[Refusal]:
        """Refusals of the reinforcements that no source sample has matched."""
        for key in self._members:
            if key not in self._matched:
                yield Refusal(key, Reason.NO_IMAGE, "reinforced, but no sample of the source's shard is of its image")

    def members(self, key: str) -> dict[str, bytes]:
        """The members of one of the keys, by name."""
        places = self._members[key].items()
        return {name: os.pread(self._file.fileno(), size, offset) for name, (offset, size) in places}


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Turn an error of the temporary file into a StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"reinforcements cannot be copied to {tempfile.gettempdir()}: {error}; make room there, or set TMPDIR."
        ) from error


def check_reinforcements(url: str, config: Config, layers: Iterable[Layer]) -> None:
    """Raise UserError if the config does not fit these reinforcements: some layer is unreadable in all of the first
    samples of a shard."""
    reader = PublishedReader(config, layers)
    with contextlib.closing(Reinforcements(url, config, _CHECKED_SAMPLES)) as reinforcements:
        errors = [_layer_errors(reader, key, reinforcements.members(key)) for key in reinforcements]
    for layer in errors[0] if errors else ():
        if all(layer in others for others in errors) and (layer != SAMPLES or reads_crops(config)):
            raise UserError(
                f"{layer}: cannot be read from any of the first {len(errors)} samples of {canonical(url)}: "
                f"{errors[0][layer]}"
            )


def preview_join(url: str, config: Config, shard: Shard, budget: ReadBudget) -> str | None:
    """How the first samples of a shard join with the first of its reinforcements; None if none of either can be read.

    Raises UserError if nothing but their keys agrees, and the errors of the storage.
    """
    items = itertools.islice(read_samples(shard, config.input, budget), _JOINED_SAMPLES)
    with contextlib.closing(Reinforcements(url, config, _JOINED_SAMPLES)) as published:
        matches = [published.match(one.key, one.all_sidecars) for one in items if isinstance(one, RawSample)]
        if not matches or not [*published]:
            return None
        counts = published.counts
        if counts[UNCONFIRMED] and config.join != KEY and not any(counts[kind] for kind in KINDS):
            refused = next(match for match in matches if isinstance(match, Refusal))
            raise UserError(
                f"reinforcements: none of the first {len(matches)} samples of {canonical(shard.url)} is proven to be "
                f"the image that was labelled. {refused.key}: {refused.detail}. Keep `uid`, `sha256` or `url` in the "
                "json member of the source's samples; or, if you know that equal keys are equal images and neither "
                "side states anything else, set `join: key`."
            )
        joined = f"join the first {len([*published])} published ones: {describe_counts(published.counts)}"
    example = next((f"; {match.key}: {match.detail}" for match in matches if isinstance(match, Refusal)), "")
    return f"reinforcements: the first {len(matches)} samples of {canonical(shard.url)} {joined}{example}"


def _layer_errors(reader: PublishedReader, key: str, members: Members) -> dict[str, str]:
    """What cannot be read of a sample, by layer, independently of its image."""
    errors = {}
    try:
        reader.augmentations(members, *LARGEST_IMAGE)
    except Unreadable as error:
        errors[SAMPLES] = str(error)
    return errors | {
        name: value.detail for name, value in reader.values(key, members).items() if isinstance(value, Refusal)
    }
