"""What differs between the recipes that ``dataset.json`` records and those of a config."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from reinforce.dataset.files.store import Store
from reinforce.dataset.kinds.registry import drop_command, with_dependants
from reinforce.dataset.layers import SAMPLES, Layer, mapping_at, require_images
from reinforce.errors import UserError
from reinforce.settings import flatten
from reinforce.terminal import plural

_VALUE_CHARS = 200  # of a value in a message
_NAMES = 3  # of layers in a message


def check_recipes(
    store: Store, manifest: Mapping[str, Any] | None, layers: Mapping[str, Layer], found: Mapping[str, str | None]
) -> None:
    """Raise UserError if layers were made by other recipes than those of the config's ``layers``.

    ``found`` maps layers to their fingerprints in the dataset. The message has the settings that differ, with a layer
    and its fingerprints and the number of the others, and the command that deletes the layers.
    """
    require_images(manifest or {"images": None}, f"output: {store.url}")
    others = {name: fingerprint for name, fingerprint in found.items() if fingerprint != layers[name].fingerprint}
    if not others:
        return
    lines = [f"{store.url} was made by another config, and the results would be mixed:"]
    lines += difference_lines(dict.fromkeys(others, manifest or {}), layers, others, "the dataset")
    known = {**{name: {} for name in others}, **mapping_at(manifest or {}, "layers")}
    command = drop_command(store.url, with_dependants(others, known), known)
    choices = "write to another `output`" + (", give the changed model another name" if SAMPLES not in others else "")
    lines.append(f"Undo the change, {choices}, or delete these layers and compute them again: {command}")
    raise UserError("\n".join(lines))


def difference_lines(
    manifests: Mapping[str, Mapping[str, Any]],
    layers: Mapping[str, Layer],
    found: Mapping[str, str | None],
    where: str,
) -> Iterator[str]:
    """The settings that differ from those in manifests, each with the first layer of ``found`` that has them and its
    fingerprints; and the other layers.

    ``where`` names what the manifests belong to.
    """
    by_reason: dict[tuple[str, ...], list[str]] = {}
    for name in found:
        by_reason.setdefault(_reasons(manifests[name], layers[name], found, where), []).append(name)
    following = by_reason.pop((), [])
    for reason, (name, *others) in by_reason.items():
        yield f"  {name}: fingerprint {found[name]} in {where}, {layers[name].fingerprint} in this config"
        yield from (f"    {line}" for line in reason)
        if others:
            yield f"  {_some(others)} for the same reason"
    if following:
        yield f"  {_some(following)} computed from what differs"


def _some(names: list[str]) -> str:
    """A number of layers, with the names of the first."""
    more = ", ..." if len(names) > _NAMES else ""
    return f"{plural(len(names), 'more layer')} ({', '.join(names[:_NAMES])}{more})"


def _reasons(manifest: Mapping[str, Any], layer: Layer, found: Mapping[str, str | None], where: str) -> tuple[str, ...]:
    """Why a layer's fingerprint differs from that in a manifest, one line each; nothing if a layer that it is computed
    from differs."""
    lines = tuple(_differences(*layer.kind.recipes(layer, manifest), where))
    if lines or any(name in found for name in layer.needs):
        return lines
    entry = mapping_at(manifest, "layers", layer.name)
    now = {"count": layer.count, "dim": layer.dim, "dtype": layer.dtype, "texts": layer.texts}
    known = [key for key, value in now.items() if value and entry.get(key)]
    lines = tuple(_differences({key: entry[key] for key in known}, {key: now[key] for key in known}, where))
    return lines or ("nothing in dataset.json explains the difference",)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> Iterator[str]:
    """One line for each setting that has another value."""
    old, new = (dict(flatten(values)) for values in (before, now))
    for key in dict.fromkeys([*new, *old]):
        first, second = (
            json.dumps(values[key], ensure_ascii=False) if key in values else None for values in (old, new)
        )
        if first != second:  # as text, as in the fingerprint: 1 and 1.0 are different
            yield f"{key}: {_shorten(first)} in {where}, {_shorten(second)} in this config"


def _shorten(text: str | None) -> str:
    if text is None:
        return "not set"
    return text if len(text) <= _VALUE_CHARS else f"{text[:_VALUE_CHARS]}..."
