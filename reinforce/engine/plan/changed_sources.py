"""Source files that were replaced under their names since their samples were written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.runs.shard_records import SourceRecord
from reinforce.engine.messages.task import PendingShard
from reinforce.engine.plan.duplicates import evenly_spread
from reinforce.engine.plan.plan import Plan
from reinforce.source.identity import SourceState, listed_state, probe_state
from reinforce.source.urls import canonical
from reinforce.terminal import first_lines

_PROBED = 64  # files of which the first bytes are read, where only the modification time differs
_THREADS = 16
_NAMED = 3
_REMEDY = (
    "Restore the old files, or drop the samples of these shards (`reinforce drop DATASET samples --shard {name} "
    "--yes`) and run again, which replaces their other layers, too."
)


def referenced_source_change(shard: PendingShard, footer: Mapping[str, str]) -> tuple[str | None, bool]:
    """How the file that holds the referenced images of a shard differs from the one that its samples were read from.

    ``footer`` is that of the samples file. Returns a note, or None, and whether it is another file, in which images may
    not be at their offsets; a file that only became longer or shorter begins with the same bytes.
    """
    before, now = SourceState.from_footer(footer), probe_state(shard.url)
    if now is None or before.same_content(now) is not False:
        return None, False
    note = (
        f"{canonical(shard.url)} has changed since its samples were written: {before.describe_change(now)}; its images "
        "are read by reference"
    )
    return note, None not in (before.head, now.head) and before.head != now.head


def describe_replaced(shard: PendingShard, note: str | None) -> str:
    """The error where the referenced images of a file are not those that were in it."""
    return f"{note}. The referenced images are not where they were. {_REMEDY.format(name=shard.name)}"


def changes_note(plan: Plan, recorded: Mapping[str, SourceRecord]) -> str | None:
    """A warning about shards that get new layers and whose source file has changed since their samples were written.

    A shard that the listing of the source or the records lack is not judged. Where only the modification time differs,
    the first bytes of some files decide.
    """
    changed, unsure = [], []
    for shard in plan.pending:
        info, before = plan.listed.get(shard.url), recorded.get(shard.name)
        if info is None or before is None or SAMPLES in shard.layers:
            continue
        now = listed_state(info)
        if now.bytes != before.state.bytes and None not in (now.bytes, before.state.bytes):
            changed.append(f"{shard.name}: {before.state.describe_change(now)}")
        elif now.stamp != before.state.stamp and before.url == canonical(shard.url):
            unsure.append((shard, before.state))
    probed = evenly_spread(unsure, _PROBED)
    with ThreadPoolExecutor(_THREADS) as pool:
        states = [*pool.map(lambda item: probe_state(item[0].url), probed)]
    for (shard, before_state), state in zip(probed, states, strict=True):
        if state is not None and before_state.same_content(state) is False:
            changed.append(f"{shard.name}: {before_state.describe_change(state)}")
    extended = sum(SAMPLES not in shard.layers for shard in plan.pending)
    stored = "from the stored images" if plan.config.embeds_images else "from images at their old offsets"
    return _note(changed, f"{extended:,} shards that get new layers", f"The new layers are computed {stored}")


def finished_note(plan: Plan, recorded: Mapping[str, SourceRecord]) -> str | None:
    """A warning about shards that lack nothing, and whose source file has another size than when it was read."""
    changed = []
    for name, size in plan.finished.items():
        before = recorded[name].state if name in recorded else None
        if before is not None and before.bytes not in (None, size):
            changed.append(f"{name}: {before.describe_change(SourceState(size, None))}")
    return _note(changed, f"{len(plan.finished):,} finished shards", "The dataset has what was in them then")


def _note(changed: Sequence[str], of: str, result: str) -> str | None:
    """The warning about the ``changed`` ones, as lines, ``of`` all shards, if there are any."""
    since = f"changed since their samples were written ({'; '.join(first_lines(changed, _NAMED))})"
    remedy = _REMEDY.format(name="SHARD")
    return f"source: {len(changed):,} of {of} have {since}. {result}. {remedy}" if changed else None
