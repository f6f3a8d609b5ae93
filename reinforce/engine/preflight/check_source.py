"""Checks of the source before a run, and with a plan: its names, whether it can be read, and one sample of it.

One image-text pair is read as a run reads it, with the limits of the config. Its image is not decoded: what happens to
an image that crashes or hangs the decoder is a matter of the workers.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from reinforce.config import Config
from reinforce.dataset.layers import SAMPLES, TRUE_CAPTION
from reinforce.engine.messages import PendingShard
from reinforce.engine.plan.plan import Plan
from reinforce.errors import UserError
from reinforce.images.policy import ImageRefused, check_decoder, check_header, is_heic
from reinforce.labels.index import MissingLabels, identity_of
from reinforce.labels.members import Wanted
from reinforce.labels.rows import open_labels
from reinforce.processes.attempts import Attempts, pause_seconds
from reinforce.processes.imports import HEIC_HINT, reads_heic
from reinforce.source.file_types import is_image_name
from reinforce.source.formats.base import (
    SeveralCaptions,
    Shard,
    SourceFormat,
    find_format,
    find_several,
    read_samples,
    unexpected_name,
)
from reinforce.source.references import probe_state
from reinforce.source.samples import REPLACED, RawSample, ReadBudget, Refusal
from reinforce.source.urls import canonical, filesystem
from reinforce.terminal import plural

_READ_ITEMS = 64  # samples and refusals at the beginning of a shard, among which one sample must be readable
_READ_BYTES = 64 * 2**20  # in addition to the largest image
_FIRST_ITEMS = 4  # of which one image should differ
_CAPTION_CHARS = 60


@dataclass(frozen=True)
class FirstSample:
    """The first sample of a source that can be read."""

    url: str
    raw: RawSample
    size: tuple[int, int] | None  # width and height, or None for formats whose header is not read here
    captions: Sequence[str]
    several: SeveralCaptions | None = None
    taken: str | None = None  # the caption that a run takes of the sample with the most of them, by default
    key_of_row: bool = False  # the key was made of the shard's name, and so of the URL
    equal: int = 0  # the number of the first samples, if they have one image
    unread_heic: bool = False  # one of the first samples is a HEIC, whose decoder is not installed

    @property
    def caption(self) -> str | None:
        return next(iter(self.captions), None)

    def line(self) -> str:
        image = next(filter(is_image_name, self.raw.members), self.raw.members[0])
        size = "" if self.size is None else f", {self.size[0]} x {self.size[1]}"
        shown = self.caption or ""
        shown = shown if len(shown) <= _CAPTION_CHARS else f"{shown[:_CAPTION_CHARS]} ..."
        caption = "no caption" if self.caption is None else f"caption {shown!r}"
        caption += f" and {len(self.captions) - 1} more" if len(self.captions) > 1 else ""
        return f"first sample: {self.raw.key} (.{image}{size}), {caption}"

    def notes(self, plan: Plan) -> list[str]:
        """Possible problems of the sample, one line each."""
        notes, place = [], f"the first sample of {canonical(self.url)}, {self.raw.key}"
        fields = plan.config.input.caption_fields
        encoded = any(layer.texts == TRUE_CAPTION for layer in plan.layers.values())
        if self.caption is None and fields and encoded:
            why = self.raw.why_no_caption(fields)
            notes.append(f"{place}: {why}; set input.captions to where captions are, or to none")
        if REPLACED in (self.caption or ""):
            notes.append(f"{place}: its caption has bytes that are not UTF-8, which become U+FFFD")
        if encoded and self.several and (note := self._several_note(plan.config)):
            notes.append(note)
        if self.key_of_row and _is_new(plan):
            notes.append(
                f"{place}: rows without a key get one made of the file's URL, and with it other augmentations "
                "and captions if the files are read from another place; name a column in input.key, or state `moved` "
                "after a move"
            )
        if self.equal and not (self.several and self.several.rows):
            notes.append(f"{canonical(self.url)}: the first {self.equal} samples have the same image; check the source")
        if self.unread_heic:
            notes.append(f"{canonical(self.url)}: images of the first samples are HEIC, and quarantined. {HEIC_HINT}")
        images = [*filter(is_image_name, self.raw.members)]
        if len(images) > 1:
            listed = ", ".join(f".{extension}" for extension in images[:5])
            notes.append(
                f"{place}: {len(images)} images ({listed}), of which one is read; a key ends at the first dot "
                "of the file name"
            )
        return notes

    def _several_note(self, config: Config) -> str | None:
        """How several true captions are handled, if the first samples have some."""
        several, kept = self.several, config.input.captions_per_sample
        if several is None or several.most <= (kept or 1):
            return None
        if kept is not None:
            used = f"of which {kept} {'is' if kept == 1 else 'are'} kept"
        elif several.rows:
            used = "in rows that are a sample each"
        elif self.taken is None:
            used = "of which none is used"
        else:
            first = max(several.texts, key=len)[0]
            used = "of which the first is used" if self.taken == first else "which are read as one"
        where = f"{canonical(self.url)}: the first samples have up to {several.most} true captions, {used}"
        return f"{where}; input.captions_per_sample: {several.most} keeps and embeds them"


def check_source(plan: Plan) -> tuple[FirstSample | None, list[str]]:
    """Return a sample of the source, None if no sample is to be read, and notes for the user.

    Raises UserError if the source or the published reinforcements cannot be read, or do not fit the config. Where a
    dataset has samples already, the files that are no tars are only noted: a run quarantines them.
    """
    new = [shard for shard in plan.pending if SAMPLES in shard.layers]
    named, notes = _check_names(new, _is_new(plan))
    notes = [*plan.source_notes, *notes]
    if named and find_format(named[0].format).is_listed:  # its shards are no files
        readable = named[:1]
    else:
        found = {*_check_readable("source", [shard.source.file for shard in named])}
        firsts = {shard.source.file: shard for shard in reversed(named)}
        readable = [firsts[file] for file in dict.fromkeys(shard.source.file for shard in named) if file in found]
    tars = [shard for shard in plan.pending if shard.reinforcements]
    _check_readable("reinforcements", [str(shard.reinforcements) for shard in tars])
    notes += _preview_labels(plan, tars or readable)
    notes += _undivided(named) if _is_new(plan) and plan.config.input.rows_per_shard is None else []
    sample, faults, doubts = _first_sample([plan.shard(shard) for shard in readable], plan.config)
    if faults and _is_new(plan) and sample is None and not doubts:
        raise UserError(f"source: no sample can be read. {'; '.join(faults)}.")
    with contextlib.suppress(Exception):  # each driver has its own exceptions; reading the first sample reports them
        notes += [note for one in readable[:1] for note in find_format(one.format).notes(one.source.file)]
    notes += [f"source: {fault}" for fault in faults + doubts]
    most = plan.config.input.captions_per_sample or 1
    if teachers := sum(layer.texts == TRUE_CAPTION for layer in plan.layers.values()) if most > 1 else 0:
        notes.append(
            f"true captions: up to {most} a sample, each encoded by {plural(teachers, 'teacher')}, which "
            f"{'stores' if teachers == 1 else 'store'} {most} vectors a sample"
        )
    return sample, notes + (sample.notes(plan) if sample else [])


def _preview_labels(plan: Plan, shards: Sequence[PendingShard]) -> list[str]:
    """How the first samples of a shard that is still to be read join with its labels.

    Raises UserError if labels have no index, do not have what the config takes, or agree in nothing but keys.
    """
    tar, where = (shards[0].reinforcements, canonical(shards[0].url)) if shards else (None, "")
    layers = [plan.layers[name] for name in shards[0].layers] if tar else [*plan.layers.values()]
    if all(layer.labels is None for layer in layers):
        return []
    samples: list[Wanted] = []
    new = [shard for shard in shards[:1] if SAMPLES in shard.layers]
    with contextlib.suppress(Exception):  # each driver has its own; reading the first sample reports them
        for shard in new:
            budget = ReadBudget(plan.config.input.limits.image_bytes + _READ_BYTES)
            for raw in itertools.islice(read_samples(plan.shard(shard), plan.config.input, budget), _READ_ITEMS):
                if isinstance(raw, RawSample):
                    samples.append(Wanted(raw.key, identity_of(raw.all_sidecars), raw.image))

    def preview() -> list[str]:
        with contextlib.closing(open_labels(plan.config, layers, tar, values=False, limit=_READ_ITEMS)) as labels:
            return [note for one in labels.sets for note in one.preview(samples, where)]

    count = plan.config.failures.attempts
    attempts = Attempts(count, tuple(map(pause_seconds, range(1, count))))
    return attempts.call(preview, lambda error: isinstance(error, MissingLabels))


def _undivided(shards: Sequence[PendingShard]) -> list[str]:
    """A note on a large table that is one shard."""
    for shard in shards[:1]:
        most = find_format(shard.format).whole_bytes
        size = probe_state(shard.url) if most else None
        if most and size and (size.bytes or 0) > most:
            return [
                f"source: {canonical(shard.url)} has {size.bytes:,} bytes and is one shard, which one worker reads; "
                "set input.rows_per_shard to divide such files, before the first run"
            ]
    return []


def _is_new(plan: Plan) -> bool:
    """Whether the dataset has no samples yet."""
    return plan.states[SAMPLES].done == 0


def _check_names(shards: Sequence[PendingShard], new: bool) -> tuple[Sequence[PendingShard], list[str]]:
    """The files that may have the format of the source by their names, or all if none may, and a note on the others.

    Raises UserError if no file of a ``new`` source may.
    """
    if not shards:
        return shards, []
    format_ = find_format(shards[0].format)
    kinds = {shard.url: kind for shard in shards if (kind := unexpected_name(shard.source.file, format_))}
    if not kinds:
        return shards, []
    url, kind = next(iter(kinds.items()))
    if len(kinds) == len(shards):
        others = "" if len(shards) == 1 else f" and {len(shards) - 1:,} more files"
        message = f"source: {canonical(url)}{others}: {kind}"
        if new:
            raise UserError(f"{message}.")
        return shards, [message]
    return [shard for shard in shards if shard.url not in kinds], [
        f"source: {len(kinds):,} of {len(shards):,} files are not {format_.noun}s by their names and will be "
        f"quarantined, such as {canonical(url)}, {kind.partition(',')[0]}; write a pattern that ends in "
        f"{format_.endings[0]}"
    ]


def _check_readable(key: str, urls: Sequence[str]) -> list[str]:
    """Return which of the first, the middle and the last file exist. Raises UserError if none does."""
    probes = list(dict.fromkeys((urls[0], urls[len(urls) // 2], urls[-1]))) if urls else []
    with ThreadPoolExecutor(3) as pool:  # a storage that does not answer takes minutes for each
        faults = [*pool.map(_read_error, probes)]
    if faults and None not in faults:
        raise UserError(
            f"{key} cannot be read: {'; '.join(map(str, faults))}. Check the URL pattern and the credentials."
        )
    return [url for url, fault in zip(probes, faults, strict=True) if fault is None]


def _read_error(url: str) -> str | None:
    """Why a file cannot be read, or None."""
    try:
        fs, path = filesystem(url)
        return None if fs.exists(path) else f"{canonical(url)} does not exist"
    except Exception as error:  # each driver has its own exceptions
        return f"{canonical(url)}: {type(error).__name__}: {error}"


def _first_sample(shards: Sequence[Shard], config: Config) -> tuple[FirstSample | None, list[str], list[str]]:
    """The first sample of the first shard that has one; the faults of the shards before it, and those of them that
    were not read to their end."""
    faults: list[str] = []
    doubts: list[str] = []
    for shard in shards:
        size = config.input.limits.image_bytes + _READ_BYTES
        budget = ReadBudget(size)
        try:
            found = _sample_of(shard, config, budget)
        except UserError:
            raise
        except Exception as error:  # each driver has its own exceptions
            found = f"{type(error).__name__}: {error}"
        if isinstance(found, FirstSample):
            return found, faults, doubts
        if budget.left:
            faults.append(f"{canonical(shard.url)}: {found}")
        else:
            doubts.append(f"{canonical(shard.url)}: no sample in its first {size:,} bytes; the rest is read by the run")
    return None, faults, doubts


def _sample_of(shard: Shard, config: Config, budget: ReadBudget) -> FirstSample | str:
    """The first sample of a shard, or why there is none at its beginning."""
    limits = config.input.limits
    refusals: list[Refusal] = []
    for item in itertools.islice(read_samples(shard, config.input, budget), _READ_ITEMS):
        if isinstance(item, Refusal):
            refusals.append(item)
            continue
        try:
            check_decoder(item.image)
            in_c = item.image[8:12] == b"WEBP" or item.image[4:8] == b"ftyp"  # formats whose headers Pillow parses in C
            size = None if in_c else check_header(item.image, limits)
        except ImageRefused as refused:
            refusals.append(Refusal(item.key, refused.reason, refused.detail))
            continue
        own = find_format(shard.format).is_table and item.key.startswith(f"{shard.name}-")
        first: list[RawSample | Refusal] = []
        with contextlib.suppress(Exception):  # as above
            few = ReadBudget(_FIRST_ITEMS * limits.image_bytes)
            first = [*itertools.islice(read_samples(shard, config.input, few), _FIRST_ITEMS)]
        samples = [other for other in first if isinstance(other, RawSample)]
        images = [one.image for one in samples]
        equal = len(images) if len(images) > 1 and len({*images}) == 1 else 0
        several, taken = None, None
        with contextlib.suppress(Exception):  # as above
            few_samples = [item, *(one for one in samples if one.key != item.key)]
            several = find_several(shard, config.input, few_samples)
            texts = several.texts[:1] if find_format(shard.format).is_table else several.texts
            fullest = max(range(len(texts)), key=lambda number: len(texts[number]))
            taken = few_samples[fullest].caption(config.input.caption_fields, limits)
        heic = any(
            HEIC_HINT in one.detail if isinstance(one, Refusal) else is_heic(one.image) and not reads_heic()
            for one in [*refusals, *first]
        )
        return FirstSample(shard.url, item, size, item.captions(config.input), several, taken, own, equal, heic)
    return _describe(refusals, find_format(shard.format))


def _describe(refusals: Sequence[Refusal], format_: SourceFormat) -> str:
    if not refusals:
        return f"the {format_.noun} contains no sample"
    first = next((refusal for refusal in refusals if refusal.key is None), refusals[0])
    if first.key is None:
        return first.detail
    what = "the only sample cannot" if len(refusals) == 1 else f"none of the first {len(refusals)} samples can"
    return f"{what} be read: {first.key}: {first.reason.value}: {first.detail}"
