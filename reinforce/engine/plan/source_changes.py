"""Source files that are copies of others, and those that were replaced under their names since samples were written.

Shards are named after their URLs, so the same files under another folder, host or link are new shards. Where file names
meet, some contents are compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.runs import SourceRecord
from reinforce.dataset.store import Store, parse_footer
from reinforce.engine.messages import PendingShard
from reinforce.engine.plan.plan import Plan
from reinforce.errors import UserError
from reinforce.source.references import SourceState, listed_state, moved_folders, probe_state
from reinforce.source.urls import canonical, shard_stem
from reinforce.terminal import first_lines

T = TypeVar("T")

_COMPARED = 64  # new shards that share their file name with another shard, evenly spread
_TWINS = 8  # other shards that each of them is compared with
_THREADS = 16
_SHOWN_FOLDERS = 3
_PROBED = 64  # files of which the first bytes are read, where only the modification time differs
_NAMED = 3
_REMEDY = (
    "Restore the old files, or drop the samples of these shards (`reinforce drop DATASET samples --shard {name} "
    "--yes`) and run again, which replaces their other layers, too."
)


@dataclass(frozen=True)
class Copies:
    """Result of comparing new shards with shards of the same file name.

    ``pairs`` are the URLs (new shard, other shard) with equal content; ``compared`` counts the new shards that were
    compared, and ``new`` those whose file name another shard has.
    """

    pairs: Sequence[tuple[str, str]]
    compared: int
    new: int


def check_copies(plan: Plan, store: Store) -> None:
    """Raise UserError if new shards have the content of other shards, so that their samples would be stored twice."""
    found = find_copies(plan, store)
    if not found.pairs:
        return
    new, other = found.pairs[0]
    folders = dict([*moved_folders(found.pairs).items()][:_SHOWN_FOLDERS])
    value = ", ".join(f'"{now}": "{before}"' for now, before in folders.items())
    raise UserError(
        f"source: {found.new:,} new shards have the file name of another shard, {found.compared:,} of them were "
        f"compared with it, and {len(found.pairs):,} have the same content, for example {new} and {other}. Their "
        "samples would be stored twice. If the files were moved or linked, keep the names of their shards: set "
        f"`moved: {{{value}}}`. If `source` lists files twice, list them once."
    )


def find_copies(plan: Plan, store: Store) -> Copies:
    """Compare a bounded number of new shards with the shards of the same file name. Shards named by ``moved`` to be
    where they were (a folder mapped to itself) are not compared."""
    meeting = _meeting_shards(plan)
    chosen = evenly_spread(meeting, _COMPARED)
    if not chosen:
        return Copies((), 0, 0)
    new = {shard.name: shard.url for shard in plan.pending if SAMPLES in shard.layers}

    def compare(item: tuple[PendingShard, list[str]]) -> str | Literal[False] | None:
        """The URL of the shard that the new one is a copy of, False if it is none, None if nothing can be compared."""
        shard, names = item
        state = probe_state(shard.url)
        outcome: Literal[False] | None = None
        for name in names if state is not None else ():
            assert state is not None
            same: bool | None = None
            url = new.get(name, name)
            if name in new:
                other = probe_state(url)
                same = state.same_content(other) if other is not None else None
            else:
                # Each driver has its own exceptions, and a damaged file is reported where it is needed.
                with contextlib.suppress(Exception), store.open_layer(SAMPLES, name, whole=False) as file:
                    footer = parse_footer(file.metadata)
                    same, url = state.same_content(SourceState.from_footer(footer)), footer.get("source", name)
            if same:
                return url
            outcome = same if same is not None else outcome
        return outcome

    with ThreadPoolExecutor(_THREADS) as pool:
        outcomes = [*pool.map(compare, chosen)]
    pairs = [
        (canonical(shard.url), canonical(outcome))
        for (shard, _), outcome in zip(chosen, outcomes, strict=True)
        if isinstance(outcome, str)
    ]
    return Copies(pairs, len(outcomes) - outcomes.count(None), len(meeting))


def evenly_spread(items: Sequence[T], most: int) -> list[T]:
    """At most ``most`` of the items, evenly spread over them."""
    step = max(1, len(items) / most)
    return [items[int(i * step)] for i in range(min(most, len(items)))]


def _meeting_shards(plan: Plan) -> list[tuple[PendingShard, list[str]]]:
    """New shards with the names of others, committed or new, that have the same file name."""
    new = [shard for shard in plan.pending if SAMPLES in shard.layers]
    if not new:
        return []
    stems = {shard_stem(shard.name) for shard in new}
    if len(stems) == len(new) and stems.isdisjoint(map(shard_stem, plan.committed)):
        return []
    owners: dict[str, list[str]] = {}
    for name in plan.committed:
        owners.setdefault(shard_stem(name), []).append(name)
    kept = tuple(f"{canonical(folder)}/" for folder, former in plan.config.moved.items() if folder == former)
    meeting = []
    for shard in new:
        names = owners.setdefault(shard_stem(shard.name), [])
        if names and not (kept and canonical(shard.url).startswith(kept)):
            meeting.append((shard, names[:_TWINS]))
        names.append(shard.name)
    return meeting


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
