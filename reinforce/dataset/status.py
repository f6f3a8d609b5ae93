"""Status of a dataset: its layers, its quarantine and the last run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from reinforce.dataset.aligned import check_completeness
from reinforce.dataset.index import find_damaged, read_index, without_files
from reinforce.dataset.kinds.registry import stored_layer
from reinforce.dataset.layers import LABELS, MODEL_SECTIONS, SAMPLES, mapping_at
from reinforce.dataset.manifest import code_lines, read_manifest
from reinforce.dataset.runs import list_runs, read_summary
from reinforce.dataset.store import DamagedFile, Listing, Store
from reinforce.dataset.view import view_states
from reinforce.terminal import escape, format_bytes, plural

_QUARANTINE_FILES = 1000  # per layer whose reasons are counted


def read_status(url: str) -> dict[str, Any]:
    """Read shards and bytes by layer, quarantined rows by layer and reason, also those of ``labels/NAME``, and the last
    run's summary.

    ``examples`` of a layer's quarantine has the shard, the key and the detail of the first row of each reason.
    ``quarantined`` counts samples once: ``samples``, by layer the rows of those that no layer before has, by reason,
    and ``following`` rows of the others in ``following_layers``.
    ``damaged`` are ``DamagedFile`` and count as missing, ``lost`` names shards whose samples are gone, ``notes`` are
    lines about custom classes that have changed, ``views`` are ``ViewState``. Raises UserError if there is no dataset.
    """
    store = Store(url)
    manifest = read_manifest(store)
    names = [*manifest["layers"]]
    fingerprints = {name: entry["fingerprint"] for name, entry in manifest["layers"].items()}
    committed = read_index(store, SAMPLES, fingerprints[SAMPLES]).listing()
    listings = store.listings(names, committed)
    models = [model for section in MODEL_SECTIONS for model in manifest[section].values()]
    taken = any(mapping_at(model, "model", LABELS) for model in models)
    of_labels = [f"{LABELS}/{name}" for name in store.names("quarantine", LABELS, folders=True)] if taken else []
    quarantined = store.listings(f"quarantine/{name}" for name in (*names, *of_labels))
    damaged = find_damaged(store, listings, fingerprints)
    found = check_completeness(store, {SAMPLES: listings[SAMPLES]}, [committed, *listings.values()])
    layers = {}
    for name, listing in without_files(listings, damaged).items():
        layers[name] = {**manifest["layers"][name], "shards": len(listing), "bytes": listing.total_bytes}
    listed = {name: files for name in (*names, *of_labels) if (files := quarantined[f"quarantine/{name}"])}
    unreadable: list[DamagedFile] = []
    quarantine, counts = _read_quarantine(store, listed, unreadable)
    return {
        "url": store.url,
        "samples": layers[SAMPLES]["shards"],
        "layers": layers,
        "quarantine": quarantine,
        "quarantined": counts,
        "damaged": [*damaged, *sorted(unreadable)],
        "lost": found.describe_missing(),
        "notes": code_lines(manifest),
        "last_run": next((one for run in list_runs(store) if (one := read_summary(store, run)) is not None), None),
        "views": [*view_states(store, manifest, listings[SAMPLES].names.to_pylist())],
    }


def _read_quarantine(
    store: Store, listed: Mapping[str, Listing], damaged: list[DamagedFile]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Counts and first examples by reason, of some quarantine files of each layer, and counts of samples, each of which
    counts in the first layer that has it. ``damaged`` receives damaged files."""
    layers: dict[tuple[str, str | None], str] = {}  # by shard and key
    own: dict[str, Counter[str]] = {}
    following: Counter[str] = Counter()
    found = {}
    for layer, files in listed.items():
        reasons: Counter[str] = Counter()
        examples: dict[str, str] = {}
        first = Listing(files.names[:_QUARANTINE_FILES], files.sizes[:_QUARANTINE_FILES])
        for row, shard in (
            (row, shard) for shard, rows in store.quarantined_rows(layer, first, damaged) for row in rows
        ):
            reason = f"{row['reason']}" + (" (shard)" if row["key"] is None else "")
            reasons[reason] += 1
            if layers.setdefault((shard, row["key"]), layer) == layer:
                own.setdefault(layer, Counter())[reason] += 1
            else:
                following[layer] += 1
            if reason not in examples:
                parts = [shard, row["key"], row["detail"]]
                examples[reason] = ": ".join(" ".join(part.split()) for part in parts if part)
        found[layer] = {"files": len(files), "reasons": dict(reasons.most_common()), "examples": examples}
    return found, {
        "samples": sum(key is not None for _, key in layers),
        "layers": {layer: dict(reasons.most_common()) for layer, reasons in own.items()},
        "following": following.total(),
        "following_layers": len(following),
    }


def quarantine_lines(status: dict[str, Any], with_examples: bool) -> list[str]:
    """The quarantine of ``read_status`` for people: samples are counted in the first layer that has them."""
    lines = []
    counted = status["quarantined"]
    for layer, reasons in counted["layers"].items():
        counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
        entry = status["quarantine"][layer]
        lines.append(f"quarantine/{layer}: {plural(entry['files'], 'shard')}; {counts}")
        lines += [f"  {reason}, for example {entry['examples'][reason]}" for reason in reasons if with_examples]
    if rows := counted["following"]:
        layers = plural(counted["following_layers"], "layer")
        lines.append(f"quarantine of {layers} computed from these: {plural(rows, 'row')} of the same samples")
    if len(counted["layers"]) > 1 or counted["following"]:
        lines.append(f"quarantined in all: {plural(counted['samples'], 'sample')}")
    return lines


def status_table(status: dict[str, Any]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("layer", "shards", "bytes", "content"):
        justify: Literal["left", "right"] = "right" if heading in ("shards", "bytes") else "left"
        table.add_column(heading, justify=justify, no_wrap=True)
    for name, layer in status["layers"].items():
        stored = stored_layer(name, layer)
        content = stored.kind.content(stored).plan
        row = (name, f"{layer['shards']:,}/{status['samples']:,}", format_bytes(layer["bytes"]))
        table.add_row(*(Text(escape(cell)) for cell in (*row, content)))
    return table
