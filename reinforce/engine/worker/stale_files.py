"""Stale or damaged layer files of a shard: found and set aside.

A file that is damaged, or whose rows are not those of the samples, is set aside, and the run computes it again after
its other shards. Samples decide the rows, so they stay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from reinforce.dataset.files.damage import file_damage, set_aside
from reinforce.dataset.files.layer_file import LayerFile, RefusedFile
from reinforce.dataset.files.origin import other_origin
from reinforce.dataset.files.store import Store, parse_footer
from reinforce.dataset.layers import SAMPLES
from reinforce.errors import UserError
from reinforce.source.identity import SourceState

_MISSING = "it does not exist any more"
_OTHER_ROWS = "its rows are not those of the samples"


class MisalignedLayer(Exception):
    """A layer of the shard, the first of ``args``, does not have the rows of its samples, or is of another source."""

    def __str__(self) -> str:
        return f"{self.args[0]} does not have the rows of the samples"


def set_inputs_aside(
    store: Store,
    shard: str,
    layers: Collection[str],
    error: RefusedFile | MisalignedLayer,
    replaceable: Callable[[], bool],
) -> dict[str, str] | None:
    """Set aside the files because of which reading has failed with ``error``; returns the reasons by layer.

    ``layers`` are those of the shard that the lease does not compute. Returns None if no file is at fault: a file that
    reads well at the second time was damaged on its way. Samples are set aside only where ``replaceable()``; otherwise
    raises RefusedFile.
    """
    if isinstance(error, MisalignedLayer):
        if SAMPLES in layers:
            return set_stale_aside(store, shard, layers, *_stored_samples(store, shard), None, new=False)
        set_aside(store, error.args[0], shard)  # the samples are being computed
        return {error.args[0]: _OTHER_ROWS}
    if error.file is None:
        return None
    layer = error.file[0]
    try:
        reason = file_damage(store, layer, shard)
    except FileNotFoundError:
        return {layer: _MISSING}
    if reason is None:
        return None
    if layer == SAMPLES and not replaceable():
        raise RefusedFile(
            f"{store.layer_path(layer, shard)} is damaged ({reason}). It stays, because its source cannot be read or "
            "has changed, and it may be the only copy of its images. Restore it, or its source."
        )
    set_aside(store, layer, shard)
    return {layer: reason}


def set_stale_aside(
    store: Store,
    shard: str,
    layers: Iterable[str],
    groups: Sequence[Sequence[str]],
    origin: Mapping[str, str],
    recorded: SourceState | None,
    *,
    new: bool = True,
) -> dict[str, str]:
    """Set aside the files of layers that do not fit the samples, whose row groups have the keys ``groups``.

    ``origin`` are the footer entries of the samples about their source file. A file whose source had another content is
    of other images, even if the keys are the same; its own footer records that content, else ``recorded`` does. Of
    ``new`` samples, a file that does not exist is one that an earlier attempt has set aside. Returns the reasons.
    """
    reasons = {}
    for layer in layers:
        try:
            if layer != SAMPLES and (reason := _stale_reason(store, layer, shard, groups, origin, recorded)):
                set_aside(store, layer, shard)
                reasons[layer] = reason
        except FileNotFoundError:
            if new:
                reasons[layer] = _MISSING
    return reasons


def _stale_reason(
    store: Store,
    layer: str,
    shard: str,
    groups: Sequence[Sequence[str]],
    origin: Mapping[str, str],
    recorded: SourceState | None,
) -> str | None:
    try:
        with store.open_layer(layer, shard) as file:
            if reason := other_origin(origin, parse_footer(file.metadata), recorded):
                return reason
            return None if _keys(file) == [*map(list, groups)] else _OTHER_ROWS
    except RefusedFile as error:
        return str(error)


def _stored_samples(store: Store, shard: str) -> tuple[list[list[str]], dict[str, str]]:
    """The keys of each row group of the stored samples, and their footer. Raises UserError if they cannot be read."""
    try:
        with store.open_layer(SAMPLES, shard) as file:
            return _keys(file), parse_footer(file.metadata)
    except RefusedFile as error:
        raise UserError(f"{store.layer_path(SAMPLES, shard)} cannot be read: {error}.") from error


def _keys(file: LayerFile) -> list[list[str]]:
    """The keys of each row group."""
    return [file.read_row_group(number, ["key"])["key"].to_pylist() for number in range(file.num_row_groups)]
