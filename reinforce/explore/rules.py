"""Rules of a selection: checked against a dataset, and applied to row groups.

A rule may need the n-th largest of very many numbers of each group, exactly, from counts that shards add up. A number
is an unsigned integer whose order is its own. Each pass over the shards counts the numbers by 16 of its bits, from the
highest ones, among those whose higher bits are already known; so two passes find a float32. Where few numbers are left,
a pass counts them by all of their bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pandas.util import hash_array

import schemas
from reinforce.dataset.kinds.registry import stored_layer
from reinforce.dataset.layers import SAMPLES, embeddings_layer
from reinforce.errors import UserError
from reinforce.explore.config import Rule, Together
from reinforce.explore.expressions import Expression, check, comparable, numbers
from reinforce.explore.neighbours import Reference, load_faiss, mean_vectors

_BITS = 16
_FEW = 2**16  # numbers that are counted by all bits that are left
HASH_BITS = 48

Ordered = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]


def ordered(values: npt.NDArray[Any]) -> Ordered:
    """Numbers of float32, float64, int64 or uint64 as integers of as many bits in the same order.

    -0.0 and 0.0 are equal.
    """
    size = 8 * values.dtype.itemsize
    unsigned, sign = np.dtype(f"u{size // 8}"), 2 ** (size - 1)
    if values.dtype.kind in "iu":
        return values.view(unsigned) ^ unsigned.type(sign if values.dtype.kind == "i" else 0)
    bits = (values + values.dtype.type(0)).view(unsigned)
    return np.where(bits >= sign, ~bits, bits | unsigned.type(sign)).astype(np.uint64)


def number(value: int, dtype: str) -> int | float:
    """The number of an integer of ``ordered``, which was made of numbers of this type."""
    kind, size = np.dtype(dtype).kind, 8 * np.dtype(dtype).itemsize
    sign, every = 2 ** (size - 1), 2**size - 1
    if kind in "iu":
        return value - (sign if kind == "i" else 0)
    found = value & (sign - 1) if value & sign else ~value & every
    return float(np.array(found, f"u{size // 8}").view(dtype))


class Counts(NamedTuple):
    """Counts of each pair of a group and ``bits`` [pairs], in ascending order of both."""

    groups: Ordered
    bits: Ordered
    counts: Integers

    @staticmethod
    def sum(parts: Iterable[Counts]) -> Counts:
        """Counts of all parts; they are added up whenever as many have come as there are in the sum."""
        waiting = [Counts(np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.int64))]
        for part in parts:
            waiting.append(part)
            if sum(len(one.bits) for one in waiting[1:]) > len(waiting[0].bits):
                waiting = [Counts.of(*map(np.concatenate, zip(*waiting, strict=True)))]
        return Counts.of(*map(np.concatenate, zip(*waiting, strict=True)))

    @staticmethod
    def of(groups: Ordered, bits: Ordered, counts: Integers) -> Counts:
        """The sums of counts in any order."""
        order = np.lexsort((bits, groups))
        groups, bits = groups[order], bits[order]
        first = np.ones(len(order), np.bool_)
        first[1:] = (groups[1:] != groups[:-1]) | (bits[1:] != bits[:-1])
        starts = np.flatnonzero(first)
        return Counts(groups[starts], bits[starts], np.add.reduceat(counts[order], starts) if len(starts) else counts)


@dataclass(frozen=True)
class ThresholdSearch:
    """The bits known of the number ``wanted`` of each group: those above the lowest ``left``, as ``prefix`` [groups].

    ``wanted`` counts from the largest number. Before the first pass nothing is known of the groups. ``few`` is whether
    few numbers may be the wanted ones.
    """

    left: int
    groups: Ordered = field(default_factory=lambda: np.empty(0, np.uint64))
    prefix: Ordered = field(default_factory=lambda: np.empty(0, np.uint64))
    wanted: Integers = field(default_factory=lambda: np.empty(0, np.int64))
    few: bool = False

    @property
    def step(self) -> int:
        """By how many bits the next pass counts."""
        return self.left if self.few else _BITS

    def counts(self, groups: Ordered, values: Ordered) -> Counts:
        """Counts of the candidate values of each group by their next bits."""
        if len(self.groups):
            prefix = self.prefix[np.searchsorted(self.groups, groups)]
            possible = values >> np.uint64(self.left) == prefix
            groups, values = groups[possible], values[possible]
        bits = values >> np.uint64(self.left - self.step) & np.uint64(2**self.step - 1)
        return Counts.of(groups, bits, np.ones(len(bits), np.int64))

    def narrowed(self, counts: Counts, top: int | float) -> ThresholdSearch:
        """What is known with the counts of all shards; ``top`` is the wanted number, or share, of each group.

        ``left`` is 0 when ``prefix`` are the numbers. In a group of no more than ``top`` values it is the smallest.
        """
        groups, starts = np.unique(counts.groups, return_index=True)
        sizes = np.add.reduceat(counts.counts, starts) if len(starts) else self.wanted
        wanted = self.wanted
        if not len(self.groups):
            share = np.rint(top * sizes).astype(np.int64) if isinstance(top, float) else np.full(len(sizes), top)
            wanted = np.minimum(np.maximum(share, 1), sizes)
        place = np.repeat(np.arange(len(groups)), np.diff([*starts, len(counts.bits)]))
        above = np.cumsum(sizes)[place] - np.cumsum(counts.counts)  # numbers of the group with larger bits
        possible = np.flatnonzero(above < wanted[place])
        first = possible[np.unique(place[possible], return_index=True)[1]]
        prefix = self.prefix if len(self.groups) else np.zeros(len(groups), np.uint64)
        prefix = (prefix << np.uint64(self.step)) + counts.bits[first]
        few = int(counts.counts[first].sum()) <= _FEW
        return ThresholdSearch(self.left - self.step, groups, prefix, wanted - above[first], few)

    def reached(self, groups: Ordered, values: Ordered) -> npt.NDArray[np.bool_]:
        """Which values are at least the number of their group, once it is known."""
        if not len(self.groups):
            return np.zeros(len(values), np.bool_)
        places = np.minimum(np.searchsorted(self.groups, groups), len(self.groups) - 1)
        return np.asarray((self.groups[places] == groups) & (values >= self.prefix[places]))


Codes = npt.NDArray[np.uint16]
Mask = npt.NDArray[np.bool_]


@dataclass
class RuleRows:
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
    search: ThresholdSearch | None = None
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
    def in_buckets(self) -> bool:
        """Whether it compares samples of all shards."""
        return self.spec.deduplicate is not None or self.spec.balance is not None

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

    def apply(self, group: RuleRows) -> None:
        """Mark the rows of a group that the rule excludes, in its codes."""
        if self.spec.where is not None:
            assert self.value is not None
            values = group.values[self.value.text]
            valid = np.asarray(values.is_valid())
            keeps = values.fill_null(False).to_numpy(zero_copy_only=False)
        elif self.reference is not None:
            assert self.layer is not None
            vectors, valid = mean_vectors(group.tables[self.layer])
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

    def ordered(self, group: RuleRows) -> tuple[Ordered, Ordered, Mask]:
        """The group of each row, the number by which it is kept as an integer, and whether it has both [rows]."""
        if self.value is None:
            keys = group.keys.to_numpy(zero_copy_only=False)
            order = draw(self.seed, group.shard, keys)
            for row, key in enumerate(keys if self.drawn_with else ()):
                if (group.shard, key) in self.drawn_with:
                    first = self.drawn_with[group.shard, key]
                    order[row] = 0 if first is None else draw(self.seed, first[0], np.array(first[1:], object))[0]
            return np.zeros(len(order), np.uint64), order, np.ones(len(order), np.bool_)
        values, valid = comparable(group.values[self.value.text], self.value)
        groups = np.zeros(len(values), np.uint64)
        if self.within is not None:
            texts = group.values[self.within.text]
            valid &= np.asarray(texts.is_valid())
            groups = hash_array(texts.fill_null("").to_numpy(zero_copy_only=False))
        return groups, ordered(values), valid

    def best(self, group: RuleRows) -> npt.NDArray[np.float64]:
        """The value by which a sample is preferred to its duplicates [rows]: -inf where it has none."""
        if self.value is None:
            return np.zeros(len(group.codes))
        values = numbers(group.values[self.value.text], self.value.text)
        return np.where(np.isnan(values), -np.inf, values)


def draw(seed: int, shard: str, keys: npt.NDArray[Any]) -> Ordered:
    """Numbers of ``HASH_BITS`` by which samples are drawn, the largest first; a key is unique in its shard only."""
    salt = hashlib.blake2b(f"{seed}\0{shard}".encode(), digest_size=8).hexdigest()
    hashes: Ordered = hash_array(keys, hash_key=salt, categorize=False)
    return hashes >> np.uint64(64 - HASH_BITS)


def bind(number: int, spec: Rule, seed: int, manifest: Mapping[str, Any]) -> BoundRule:
    """Check a rule against a dataset. Raises UserError."""
    where = f"rules.{number - 1}"
    rule = BoundRule(number, spec, seed)
    drawn_with: dict[tuple[str, str], tuple[str, str] | None] = {}
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
    if compared := spec.balance or spec.decontaminate:
        return replace(rule, layer=_image_layer(compared.teacher, manifest, f"{where}.{spec.name}.teacher"))
    drawn = spec.sample or spec.all_but
    for names in drawn.together if isinstance(drawn, Together) else ():
        # A group is drawn as its first sample, a large one not at all.
        places = [(shard, key) for shard, _, key in (sample.partition("/") for sample in names)]
        drawn_with |= dict.fromkeys(places, None if 2 * len(places) > int(rule.top or 0) else places[0])
    return replace(rule, drawn_with=drawn_with)


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
