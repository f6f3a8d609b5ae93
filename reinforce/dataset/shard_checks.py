"""Checks of the files of one shard: footers, checksums, keys and rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from reinforce.dataset.aligned import AlignedLayers, AlignedShard, MisalignedKeys, layer_errors
from reinforce.dataset.damage import check_columns, drop_shard_command
from reinforce.dataset.findings import Finding
from reinforce.dataset.key_sample import ShardKeys
from reinforce.dataset.layer_file import RefusedFile
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.listing import Listing
from reinforce.dataset.row_checks import RowChecks
from reinforce.dataset.store import Store, parse_footer
from reinforce.errors import UserError
from reinforce.source.urls import shard_name

SHARD_CAPACITY = 2**20  # hashes of keys from one shard


@dataclass
class CheckedShard:
    """A shard as it was read: hashes of its keys, rows, the footer of its samples, and what is wrong."""

    keys: ShardKeys = field(default_factory=lambda: ShardKeys.of([]))
    rows: int = 0
    footer: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class ShardChecks:
    """Reads shards of a dataset. ``listings`` has its layers, and their quarantine as ``quarantine/<layer>``.

    ``quick`` reads only keys.
    """

    store: Store
    manifest: Mapping[str, Any]
    listings: Mapping[str, Listing]
    quick: bool

    def check(self, shard: str) -> CheckedShard:
        """Read a shard in all its layers, the samples first. Other layers are not compared with damaged samples."""
        found = CheckedShard()
        names = sorted(self.manifest["layers"], key=lambda name: name != SAMPLES)
        read = self._layer
        for layer in names:
            if shard in self.listings[layer]:
                found.findings += read(layer, shard, found)
            if any(finding.kind != "rows" for finding in found.findings if finding.layer == SAMPLES):
                read = self._alone
        return found

    def _layer(self, layer: str, shard: str, found: CheckedShard) -> Iterator[Finding]:
        columns = {name: ("key",) for name in (SAMPLES, layer) if self.quick or name != layer}
        files = AlignedLayers(self.store, dict.fromkeys((SAMPLES, layer)), columns)
        try:
            with files.open(shard, whole=not self.quick) as opened:
                wrong = [*self._footer(layer, shard, opened.footer(layer))]
                if layer == SAMPLES:
                    found.footer = opened.footer(SAMPLES)
                yield from wrong or self._rows(layer, shard, opened, found)
        except MisalignedKeys as error:
            yield Finding("misplaced", str(error), layer, shard)
        except (UserError, OSError) as error:
            yield _unreadable(error, layer, shard)

    def _alone(self, layer: str, shard: str, found: CheckedShard) -> Iterator[Finding]:
        """What is wrong with a layer's file, if it cannot be compared with the samples of its shard."""
        try:
            with layer_errors(self.store, layer, shard), self.store.open_layer(layer, shard) as file:
                yield from self._footer(layer, shard, parse_footer(file.metadata))
                for number in range(file.num_row_groups):
                    file.read_row_group(number, ("key",) if self.quick else None)
        except (UserError, OSError) as error:
            yield _unreadable(error, layer, shard)

    def _footer(self, layer: str, shard: str, footer: Mapping[str, str]) -> Iterator[Finding]:
        """Why a file is not the one of this layer and shard, by its footer."""
        expected = self.manifest["layers"][layer]["fingerprint"]
        if footer.get("layer", layer) != layer:
            reason = f"it is a file of layer {footer['layer'][:200]}"
        elif footer.get("fingerprint") != expected:
            reason = f"it has fingerprint {footer.get('fingerprint', 'none')[:40]}, its layer has {expected}"
        elif (source := footer.get("source")) and shard_name(source) != shard:
            reason = f"it is of the source shard {source[:500]}"
        else:
            return
        yield Finding("misplaced", self._message(layer, shard, reason), layer, shard)

    def _rows(self, layer: str, shard: str, opened: AlignedShard, found: CheckedShard) -> Iterator[Finding]:
        records = self.manifest["augmentations"].get("count")
        checks = RowChecks(layer, self.manifest["layers"][layer], records)
        for number in range(opened.row_groups):
            tables = opened.read(number)
            if not self.quick:
                with layer_errors(self.store, layer, shard):
                    check_columns(layer, tables[layer])
                checks.add(tables[layer])
            if layer == SAMPLES:
                found.keys = found.keys.joined(ShardKeys.of(tables[SAMPLES]["key"].to_pylist()), SHARD_CAPACITY)
                found.rows += tables[SAMPLES].num_rows
        if not self.quick:
            for problem in checks.problems(self._quarantined(layer, shard)):
                yield Finding("rows", self._message(layer, shard, problem), layer, shard)

    def _quarantined(self, layer: str, shard: str) -> set[str]:
        """The keys in a layer's quarantine of a shard; empty for samples, whose refused keys have no row."""
        if layer == SAMPLES or shard not in self.listings[f"quarantine/{layer}"]:
            return set()
        return {row["key"] for row in self.store.quarantined(layer, shard) if row["key"] is not None}

    def _message(self, layer: str, shard: str, reason: str) -> str:
        command = drop_shard_command(self.store.url, [layer], shard)
        return f"{self.store.layer_path(layer, shard)}: {reason}. To compute it again: {command} --yes, and run again."


def _unreadable(error: UserError | OSError, layer: str, shard: str) -> Finding:
    """The finding for an error of reading: the file is damaged if its content was refused."""
    cause = error if isinstance(error, RefusedFile) else error.__cause__
    if not isinstance(cause, RefusedFile):
        return Finding("unreadable", str(error), layer, shard)
    return Finding("damaged", str(error), *(cause.file or (layer, shard)))
