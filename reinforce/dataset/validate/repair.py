"""``reinforce validate --repair``: sets the files aside that are at fault, so that the next run computes them again.

Nothing is deleted. A file stays where a run could not replace it, or where dataset.json may be wrong instead of it.
Samples come from the source, so theirs stay unless the source file can be read and has not changed.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reinforce.dataset.files.damage import SET_ASIDE, file_damage, set_aside
from reinforce.dataset.files.layer_file import RefusedFile
from reinforce.dataset.files.store import MANIFEST, QUARANTINE, DamagedQuarantine, Store, parse_footer
from reinforce.dataset.kinds.registry import drop_command, with_dependants
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.manifest.manifest import read_manifest
from reinforce.dataset.runs.shard_records import read_records
from reinforce.dataset.validate.inventory import Finding
from reinforce.dataset.validate.shard_reader import compare_source
from reinforce.errors import UserError
from reinforce.source.identity import SourceState, current_url
from reinforce.source.references import ImageRoots
from reinforce.source.urls import shard_name
from reinforce.terminal import first_lines

_NAMED = 10
#: Why a source file cannot replace samples, by its state.
_WHY = {
    "elsewhere": "was not looked at, name its folder by --sources",
    "unreadable": "cannot be read",
    "changed": "has changed ({})",
}


@dataclass
class Repair:
    """Files that were moved, with their new paths; why others stay; and the shards that the next run computes."""

    moved: list[tuple[str, str]] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    computed: Counter[str] = field(default_factory=Counter)

    def lines(self) -> Iterator[str]:
        """For people: what was moved, what stays and what the next run computes."""
        moved = [f"moved {name} to {path}" for name, path in self.moved]
        yield from first_lines(moved, _NAMED, f"more files to {SET_ASIDE}/")
        yield from first_lines(self.kept, _NAMED, "more that were not moved")
        if self.computed:
            parts = [f"{layer} of {count:,} shards" for layer, count in self.computed.items()]
            yield f"`reinforce run` with the dataset's config computes: {'; '.join(parts)}"
        elif not self.kept:
            yield "there is nothing to repair"

    def as_json(self) -> dict[str, Any]:
        moved = [{"file": name, "to": path} for name, path in self.moved]
        return {"moved": moved, "kept": self.kept, "computed": dict(self.computed)}


def repair(url: str, findings: Sequence[Finding], sources: Sequence[str] = ()) -> Repair:
    """Set the files aside that ``findings`` name as at fault; a local dataset is locked.

    Source files are looked at in the folders ``sources`` only. Raises UserError, among others if a run is writing.
    """
    roots = ImageRoots.named(sources, "--sources {}")
    store = Store(url)
    manifest = read_manifest(store, check_digest=False)  # which findings are about
    done = Repair()
    if wrong := [finding for finding in findings if finding.kind == "manifest"]:
        done.kept.append(f"nothing was moved, because {MANIFEST} is at fault, not the files: {wrong[0].message}")
        return done
    files: dict[str, list[str]] = {}
    for layer, shard in dict.fromkeys((f.layer, f.shard) for f in findings if f.at_fault):
        files.setdefault(str(layer), []).append(str(shard))
    listings = store.listings(files)
    damaged = {(f.layer, f.shard) for f in findings if f.kind == "damaged"}
    passed = {file for file in damaged if file_damage(store, str(file[0]), str(file[1])) is None}
    with store.lock():
        _repair_quarantine(store, findings, done)
        for layer, shards in files.items():
            if len(shards) == len(listings[layer]) > 1 and not all(_is_of_other(store, layer, one) for one in shards):
                command = drop_command(store.url, with_dependants([layer], manifest["layers"]), manifest["layers"])
                done.kept.append(
                    f"{layer}: none of its {len(shards):,} files was moved, because all are at fault, so {MANIFEST} or "
                    f"the samples are more likely to be wrong. Restore them; or to compute the layer again: {command}"
                )
                continue
            kept = {shard: "it can be read now" for shard in shards if (layer, shard) in passed}
            if layer == SAMPLES:
                kept = {**_only_copies(store, manifest, shards, roots), **kept}
            done.kept += (f"{layer}/{shard}.parquet was not moved: {reason}" for shard, reason in kept.items())
            for shard in shards:
                if shard not in kept:
                    done.moved.append((f"{layer}/{shard}.parquet", set_aside(store, layer, shard)))
                    done.computed[layer] += 1
    done.computed.update(f.layer for f in findings if f.kind == "missing" and f.layer and f.shard)
    return done


def _repair_quarantine(store: Store, findings: Sequence[Finding], done: Repair) -> None:
    """Set damaged quarantine files aside, and with each the file of its layer, so that a run writes the reasons of its
    null rows again. Samples stay, since they have no such rows."""
    quarantine = [(str(f.layer), str(f.shard)) for f in findings if f.kind == "quarantine"]
    others = {(f.layer, f.shard) for f in findings if f.at_fault}  # are set aside for themselves
    listings = store.listings({layer for layer, _ in quarantine})
    for layer, shard in quarantine:
        with contextlib.suppress(DamagedQuarantine):
            store.quarantined(layer, shard)
            done.kept.append(f"{QUARANTINE}{layer}/{shard}.parquet was not moved: it can be read now")
            continue
        done.moved.append((f"{QUARANTINE}{layer}/{shard}.parquet", set_aside(store, f"{QUARANTINE}{layer}", shard)))
        stored = shard in listings[layer]
        if stored and layer != SAMPLES and (layer, shard) not in others:
            done.moved.append((f"{layer}/{shard}.parquet", set_aside(store, layer, shard)))
        done.computed[layer] += layer != SAMPLES or not stored


def _only_copies(store: Store, manifest: Mapping[str, Any], shards: Iterable[str], roots: ImageRoots) -> dict[str, str]:
    """The shards whose samples a run could not compute again, with the reason."""
    recorded = read_records(store).sources
    reasons = {}
    for shard in shards:
        source, before = _source_of(store, manifest, shard)
        if source is None and shard in recorded:
            source, before = recorded[shard].url, recorded[shard].state
        if source is None:
            reason = "no file of the shard records its source"
        else:
            url = current_url(source, manifest.get("moved", {}))
            state, change, _ = compare_source(url, before, roots)
            if state == "same":
                continue
            reason = f"its source {url} {_WHY[state].format(change)}"
        reasons[shard] = f"{reason}, and the samples may be the only copy"
    return reasons


def _is_of_other(store: Store, layer: str, shard: str) -> bool:
    """Whether a file is one of another shard, by its footer."""
    try:
        with store.open_layer(layer, shard, whole=False) as file:
            source = parse_footer(file.metadata).get("source")
    except (RefusedFile, UserError, OSError):
        return False
    return bool(source) and shard_name(str(source)) != shard


def _source_of(store: Store, manifest: Mapping[str, Any], shard: str) -> tuple[str | None, SourceState]:
    """URL and state of the source file of a shard, by the footers of its files that are of this shard."""
    for layer in manifest["layers"]:
        try:
            with store.open_layer(layer, shard, whole=False) as file:
                footer = parse_footer(file.metadata)
        except (RefusedFile, UserError, OSError):
            continue
        if (source := footer.get("source")) and shard_name(source) == shard:
            return source, SourceState.from_footer(footer)
    return None, SourceState(None, None)
