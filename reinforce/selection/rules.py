"""Rules of a selection: checked against a dataset, and applied to row groups."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pandas.util import hash_array

import schemas
from reinforce.dataset.kinds.registry import stored_layer
from reinforce.dataset.layers import SAMPLES, embeddings_layer
from reinforce.errors import UserError
from reinforce.selection.config import Rule, Together
from reinforce.selection.expressions import Expression, check, comparable, numbers
from reinforce.selection.neighbours import Reference, load_faiss, mean_vectors
from reinforce.selection.thresholds import HASH_BITS, Ordered, Search, ordered

Codes = npt.NDArray[np.uint16]
Mask = npt.NDArray[np.bool_]


@dataclass
class Group:
    """Rows of a row group: columns of the samples and of layers, and the values of expressions by text.

    ``first`` is the number of its first row in the dataset.
    ``codes`` is 0 for rows that are kept so far, 2 n for those that rule n (from 1) leaves out, and 2 n + 1 for those
    for which it has no value.
    """

    shard: str
    first: int
    tables: Mapping[str, pa.Table]
    values: Mapping[str, pa.Array]
    codes: Codes

    @property
    def keys(self) -> pa.Array:
        return self.tables[SAMPLES]["key"].combine_chunks()

    @property
    def kept(self) -> Mask:
        return self.codes == 0


@dataclass(frozen=True)
class BoundRule:
    """Rule ``number`` (from 1) of a selection.

    Attributes:
        value: the expression that decides.
        within: the expression that makes groups.
        layer: the embeddings that it compares.
        images: columns of the samples with the images that it compares.
        search: the values above which it keeps samples, once they are known.
        reference: the vectors that must not be found, once they are known.
        drawn_with: of a sample in a group, by shard and key: the sample as which it is drawn; None: it never is.
    """

    number: int
    spec: Rule
    seed: int
    value: Expression | None = None
    within: Expression | None = None
    layer: str | None = None
    images: tuple[str, ...] = ()
    search: Search | None = None
    reference: Reference | None = None
    drawn_with: Mapping[tuple[str, str], tuple[str, str] | None] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.number} {self.spec.name}"

    @property
    def top(self) -> int | float | None:
        """The number or share of samples it keeps, if that depends on all of them."""
        drawn = self.spec.sample or self.spec.all_but
        if isinstance(drawn, Together):
            return drawn.count
        return drawn or (self.spec.keep.top if self.spec.keep else None)

    @property
    def bits(self) -> int:
        if self.value is None:
            return HASH_BITS
        return 8 * np.dtype(self.value.dtype).itemsize

    @property
    def expressions(self) -> list[Expression]:
        return [one for one in (self.value, self.within) if one is not None]

    @property
    def layers(self) -> set[str]:
        """Layers that it reads, besides the samples."""
        return set().union(*(one.layers for one in self.expressions), [self.layer] if self.layer else [])

    @property
    def sample_columns(self) -> set[str]:
        return set(self.images).union(*(one.sample_columns for one in self.expressions))

    def apply(self, group: Group) -> None:
        """Mark the rows of a group that the rule excludes, in its codes."""
        if self.spec.where is not None:
            assert self.value is not None
            values = group.values[self.value.text]
            valid = np.asarray(values.is_valid())
            keeps = values.fill_null(False).to_numpy(zero_copy_only=False)
        elif self.reference is not None:
            vectors, valid = self.vectors(group)
            keeps = np.ones(len(valid), np.bool_)
            alive = valid & group.kept
            keeps[alive] = ~self.reference.contains(vectors[alive])
        else:
            assert self.search is not None
            groups, order, valid = self.ordered(group)
            keeps = self.search.reached(groups, order)
            if self.spec.all_but is not None:
                keeps = ~keeps
        alive = group.kept
        group.codes[alive & ~valid] = 2 * self.number + 1
        group.codes[alive & valid & ~keeps] = 2 * self.number

    def ordered(self, group: Group) -> tuple[Ordered, Ordered, Mask]:
        """The group of each row, the number by which it is kept as an integer, and whether it has both [rows]."""
        if self.value is None:
            keys = group.keys.to_numpy(zero_copy_only=False)
            order = _draw(self.seed, group.shard, keys)
            for row, key in enumerate(keys if self.drawn_with else ()):
                if (group.shard, key) in self.drawn_with:
                    first = self.drawn_with[group.shard, key]
                    order[row] = 0 if first is None else _draw(self.seed, first[0], np.array(first[1:], object))[0]
            return np.zeros(len(order), np.uint64), order, np.ones(len(order), np.bool_)
        values, valid = comparable(group.values[self.value.text], self.value)
        groups = np.zeros(len(values), np.uint64)
        if self.within is not None:
            texts = group.values[self.within.text]
            valid &= np.asarray(texts.is_valid())
            groups = hash_array(texts.fill_null("").to_numpy(zero_copy_only=False))
        return groups, ordered(values), valid

    def best(self, group: Group) -> npt.NDArray[np.float64]:
        """The value by which a sample is preferred to its duplicates [rows]: -inf where it has none."""
        if self.value is None:
            return np.zeros(len(group.codes))
        values = numbers(group.values[self.value.text], self.value.text)
        return np.where(np.isnan(values), -np.inf, values)

    def vectors(self, group: Group) -> tuple[npt.NDArray[np.float16], Mask]:
        """The vectors that it compares [rows, D], and whether a row has one [rows]."""
        assert self.layer is not None
        return mean_vectors(group.tables[self.layer])


def _draw(seed: int, shard: str, keys: npt.NDArray[Any]) -> Ordered:
    """Numbers of ``HASH_BITS`` by which samples are drawn, the largest first; a key is unique in its shard only."""
    salt = hashlib.blake2b(f"{seed}\0{shard}".encode(), digest_size=8).hexdigest()
    hashes: Ordered = hash_array(keys, hash_key=salt, categorize=False)
    return hashes >> np.uint64(64 - HASH_BITS)


def _drawn_with(drawn: Together) -> dict[tuple[str, str], tuple[str, str] | None]:
    """As which sample each one of a group is drawn: the first of the group, none of a large one."""
    found: dict[tuple[str, str], tuple[str, str] | None] = {}
    for names in drawn.together:
        places = [(shard, key) for shard, _, key in (name.partition("/") for name in names)]
        found |= dict.fromkeys(places, None if 2 * len(places) > drawn.count else places[0])
    return found


def bind(number: int, spec: Rule, seed: int, manifest: Mapping[str, Any]) -> BoundRule:
    """Check a rule against a dataset. Raises UserError."""
    where = f"rules.{number - 1}"
    rule = BoundRule(number, spec, seed)
    if spec.where is not None:
        return replace(rule, value=check(spec.where, manifest, f"{where}.where", "boolean"))
    if spec.keep is not None:
        within = spec.keep.within
        return replace(
            rule,
            value=check(spec.keep.by, manifest, f"{where}.keep.by", "number"),
            within=None if within is None else check(within, manifest, f"{where}.keep.within", "group"),
        )
    if spec.deduplicate is not None:
        keep, teacher = spec.deduplicate.keep, spec.deduplicate.teacher
        if keep is not None:
            rule = replace(rule, value=check(keep, manifest, f"{where}.deduplicate.keep", "number"))
        if teacher is None:
            return replace(rule, images=schemas.image_columns(manifest["images"])[-1:] or (schemas.IMAGE_DIGEST,))
        return replace(rule, layer=_image_layer(teacher, manifest, f"{where}.deduplicate.teacher"))
    if spec.decontaminate is not None:
        layer = _image_layer(spec.decontaminate.teacher, manifest, f"{where}.decontaminate.teacher")
        return replace(rule, layer=layer)
    drawn = spec.sample or spec.all_but
    return replace(rule, drawn_with=_drawn_with(drawn)) if isinstance(drawn, Together) else rule


def _image_layer(teacher: str, manifest: Mapping[str, Any], where: str) -> str:
    """A teacher's embeddings of the images. Raises UserError if there are none, or no faiss."""
    layer = embeddings_layer(teacher, "images")
    if layer not in manifest["layers"]:
        stored = (stored_layer(name, entry) for name, entry in manifest["layers"].items())
        known = [str(one.model) for one in stored if one.model and one.name == embeddings_layer(one.model, "images")]
        raise UserError(
            f"{where}: no teacher {teacher!r} has embedded the images of this dataset. Those that have: "
            f"{', '.join(known) or 'none; add one to `teachers` of its run'}."
        )
    load_faiss()
    return layer


def layers_of(rules: Iterable[BoundRule]) -> list[str]:
    """The samples, and then all layers that rules read."""
    return [SAMPLES, *sorted(set().union(*(rule.layers for rule in rules)))]


def columns_of_layers(rules: Iterable[BoundRule]) -> dict[str, list[str]]:
    """The columns that rules read, of layers of which they read only some."""
    return {SAMPLES: sorted({"key"}.union(*(rule.sample_columns for rule in rules)))}


def labels(rules: Sequence[BoundRule]) -> list[str | None]:
    """The text of a view for each code."""
    return [None, None, *(text for rule in rules for text in (rule.label, f"{rule.label}: null"))]
