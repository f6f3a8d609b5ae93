"""Training examples of reinforced datasets for a loop of your own: a map-style torch dataset, and a stream."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import operator
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, overload

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from reinforce import settings
from reinforce.api.inputs import image_transform, replay_size, text_transform
from reinforce.dataset.kinds.registry import KINDS, kind_of, owner_of
from reinforce.dataset.layers import model_of
from reinforce.dataset.reading import Dataset as ReinforcedDataset
from reinforce.dataset.sample import KeptGroups, RowPlaces, checked_number
from reinforce.errors import UserError
from reinforce.images.device_records import DEVICE_BACKEND
from reinforce.student.config import Data
from reinforce.student.data.datasets import COUNTED_SHARDS, open_datasets
from reinforce.student.data.examples import Example
from reinforce.student.data.stream import PartMaker, StreamReader, make_orders
from reinforce.training import gather
from reinforce.training.order import GroupChunk, share

_LOG = logging.getLogger(__name__)
#: Rows that are searched for a usable one in place of another.
_MOST_UNUSABLE = 10_000
_READERS = 2  # threads of a stream that read row groups
_AT_ONCE = 8  # examples of a stream that are made together


class Examples(Dataset[dict[str, Any]]):
    """Training examples of reinforced datasets, as `reinforce train` makes them, for a torch ``DataLoader``.

    ``datasets`` is a folder or URI, what ``reinforce.open`` returns, or a list of URLs or ``{url, view}``. ``keys`` are
    keys of ``data`` of a student's config, such as ``teachers``, ``captioners``, ``captions`` and ``pick``.

    ``image`` makes a tensor of a Pillow image: a transform of open_clip or torchvision, or an image processor of
    transformers; default: uint8 [3, size, size]. ``tokenizer`` is one of open_clip or transformers; default: texts
    stay texts. Either may be a processor of transformers that has both. ``context`` is the length to which a tokenizer
    of transformers pads; default: its own. ``size`` is the side in pixels at which augmentations are replayed;
    default: that of ``image``, or the recorded one.

    ``examples[i]`` is a dict, of which a ``DataLoader`` makes batches:

    - ``key``: str, and ``image``: one of the stored augmentations;
    - ``caption``, and with captioners ``synthetic``: tokens, of transformers ``{input_ids, attention_mask}``;
    - ``targets``: ``{teacher: {image, caption, synthetic}}``, unit-norm float32 [D]; of ``classifiers``, if they are
      named, their tensors. Of teachers that are named under a kind of their other layers, such as ``patches=["dino"]``,
      also those: ``patches`` [rows, columns, D].

    With ``columns``, items are flat: a list of names, or a dict of your names for them, such as
    ``{"pixel_values": "image", "labels": "dfn2b/image"}``.

    Samples that lack a text or a vector that an example has are left out: ``len(examples)`` counts the others, and a
    warning states how many are left out and why. They are counted here, by reading texts and the footers of files; with
    more than 64 shards by the first ``len`` or access. Each access picks an augmentation and captions by torch's random
    numbers; after ``set_epoch`` by ``seed`` and the epoch. To read large datasets in a random order, use ``stream``:
    here a row group is read for a sample that is in none of the last ones.

    Raises UserError for a dataset that does not exist, lacks layers or is unfinished.
    """

    def __init__(
        self,
        datasets: Any,
        *,
        image: Any = None,
        tokenizer: Any = None,
        context: int | None = None,
        size: int | None = None,
        columns: Sequence[str] | Mapping[str, str] | None = None,
        seed: int = 0,
        **keys: Any,
    ) -> None:
        sources, defaults = _sources(datasets)
        others: dict[str, list[str]] = {}
        for section in [name for name in keys if owner_of(name) != name]:
            names = settings.as_names(given := keys.pop(section))
            if not isinstance(names, list):
                raise UserError(f"{section}: want names of {owner_of(section)}, got {given!r:.100}")
            others[section] = names
        self.data = settings.as_config(Data, None, datasets=sources, **{**defaults, **keys})
        if self.data.backend == DEVICE_BACKEND:
            raise UserError(f"backend {DEVICE_BACKEND} is for `reinforce train`; choose another, or none.")
        self.seed, self.epoch = _checked_whole("seed", seed), None if self.data.pick == "random" else 0
        self.datasets = open_datasets(self.data, seed, {**_models(self.data), **others})
        if isinstance(datasets, ReinforcedDataset):  # only the shards that this one has
            [dataset] = self.datasets
            kept = np.isin(np.array(dataset.shards)[dataset.groups[:, 0]], datasets.shards)
            if not kept.any():
                raise UserError(f"{dataset.url}: none of these shards has samples. Choose others.")
            self.datasets = [replace(dataset, groups=dataset.groups[kept])]
        self._image, self._tokens = image_transform(image), text_transform(tokenizer, context)
        recorded = max(dataset.size for dataset in self.datasets)
        self.size = replay_size(image) or recorded if size is None else size
        if not isinstance(self.size, int) or self.size < 1:
            raise UserError(f"size: want the side of an image in pixels, got {self.size!r:.100}")
        first = self.datasets[0]
        self.kinds, self.targets = first.spec.kinds, first.targets
        for section, names in others.items():
            found = [model_of(layer) for layer in first.spec.crops if kind_of(layer).target_section == section]
            if missing := [name for name in names if name not in found]:
                raise UserError(
                    f"{section}: {owner_of(section)[:-1]} {missing[0]} has none; those that have: "
                    f"{', '.join(found) or 'none'}."
                )
        self._maker = PartMaker(self.size, self.targets, _no_tokens, scaled=self.data.translations != "stored")
        self._columns = _checked_columns(columns, self.names)
        self._counted = sum(len(dataset.shards) for dataset in self.datasets) <= COUNTED_SHARDS
        if self._counted:
            self.datasets = [dataset.leave_out_unusable() for dataset in self.datasets]
        self._connect()

    @property
    def names(self) -> list[str]:
        """The names that ``columns`` may have."""
        return ["key", "image", *self.kinds, *(f"{target.model}/{target.name}" for target in self.targets)]

    def __len__(self) -> int:
        if not self._counted:
            self.datasets = [dataset.leave_out_unusable() for dataset in self.datasets]
            self._counted = True
            self._connect()
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return self.__getitems__(range(*index.indices(len(self))))
        [item] = self.__getitems__([index])
        return item

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The examples of a batch, as a ``DataLoader`` asks for them."""
        if self._process != os.getpid():
            self._connect()
        epoch = int(torch.randint(2**31, ())) if self.epoch is None else self.epoch
        return self.make([self._usable(index, epoch) for index in indices])

    def set_epoch(self, epoch: int) -> None:
        """Pick augmentations and captions by ``seed`` and this epoch, instead of torch's random numbers.

        A ``DataLoader`` with ``persistent_workers`` does not pass it on.
        """
        self.epoch = _checked_whole("epoch", epoch)

    def stream(self, *, window: int = 4096, rank: int | None = None, ranks: int | None = None) -> ExampleStream:
        """The same examples as a shuffled ``IterableDataset``, see ``ExampleStream``."""
        return ExampleStream(self, window, rank, ranks)

    def make(self, examples: list[Example]) -> list[dict[str, Any]]:
        """Items of examples: decode and augment their images, and tokenize their texts.

        Raises UserError if an image cannot be decoded.
        """
        part = self._maker.make(examples, self._maker.allocate(len(examples)), Counter())
        assert part.buffers is not None
        texts = {kind: self._tokens([one.texts[n] for one in examples]) for n, kind in enumerate(self.kinds)}
        items = []
        for row, key in enumerate(part.keys):
            item: dict[str, Any] = {"key": key, "image": self._image(part.buffers.image[row].numpy())}
            item |= {kind: of_kind[row] for kind, of_kind in texts.items()}
            found: dict[str, dict[str, torch.Tensor]] = {}
            for target, values in zip(self.targets, part.buffers.targets, strict=True):
                found.setdefault(target.model, {})[target.name] = values[row]
            if self._columns:
                flat = {**item, **{f"{model}/{name}": v for model, of in found.items() for name, v in of.items()}}
                items.append({name: flat[of] for name, of in self._columns.items()})
            else:
                items.append({**item, "targets": found})
        return items

    def _usable(self, index: int, epoch: int) -> Example:
        """The example of a number. In place of one with values that cannot be trained on, another one: those of
        neighbours are apart, and as different as can be. Raises UserError if there is none.
        """
        total, unusable = len(self), Counter[str]()
        number = checked_number(index, total)
        step = next(one for one in itertools.count(round(0.618 * total) or 1) if math.gcd(one, total) == 1)
        searched = min(_MOST_UNUSABLE, total)
        for attempt in range(searched):
            group, place = self._rows.find((number + attempt * step) % total)
            which, in_dataset, _ = self._rows.groups[group].tolist()
            found = self.datasets[which].load(GroupChunk(in_dataset, place, place + 1), epoch, keep=True)
            if (example := found.rows[0]) is not None:
                return example
            unusable.update(found.unusable)
        raise UserError(
            f"{self.datasets[which].url}: none of {searched:,} rows can be used ({', '.join(unusable)}). "
            f"{self.datasets[which].hint(unusable)}"
        )

    def _connect(self) -> None:
        """Open files in this process, since clients of object stores are not fork-safe."""
        self._process = os.getpid()
        self.datasets = [
            replace(one, layers=replace(one.layers, store=copy.deepcopy(one.layers.store)), kept=KeptGroups())
            for one in self.datasets
        ]
        places = [
            np.stack([np.full(len(one.groups), n), np.arange(len(one.groups)), one.groups[:, 2]], axis=1)
            for n, one in enumerate(self.datasets)
        ]
        self._rows = RowPlaces(np.concatenate(places))


class ExampleStream(IterableDataset[dict[str, Any]]):
    """Examples in a shuffled order, divided among ranks and the workers of a ``DataLoader``; ``Examples.stream``.

    An epoch has each row once: row groups are shuffled, and rows among about ``window`` of them. Of several datasets,
    each comes by its weight. With several ``ranks`` all workers of all ranks give equally many examples, so that up to
    one less than their number are left out. With more than 64 shards, others of their window replace rows that cannot
    be used.

    The order is that of ``seed`` and the epoch: iterating begins the next one. In the workers of a ``DataLoader``,
    which are copies, one is drawn by torch's random numbers; call ``set_epoch`` before each epoch with several ranks,
    as for torch's ``DistributedSampler``. ``rank`` and ``ranks`` are those of torch.distributed unless they are given:
    ``rank=0, ranks=1`` is for a program that itself distributes batches, such as accelerate.
    """

    def __init__(
        self, examples: Examples, window: int = 4096, rank: int | None = None, ranks: int | None = None
    ) -> None:
        # A copy: with many shards, `len(examples)` leaves rows out, and the order of a stream stays as it is.
        self.examples, self.window, self.epoch = copy.copy(examples), _checked_whole("window", window, 1), 0
        rank, ranks = (None if one is None else _checked_whole("rank and ranks", one) for one in (rank, ranks))
        self._stated: int | None = None  # by set_epoch
        if (rank is None) != (ranks is None) or (rank is not None and ranks is not None and not 0 <= rank < ranks):
            raise UserError(f"rank ({rank}) and ranks ({ranks}) belong together, with rank below ranks.")
        # torch.distributed is not initialised in a worker that is spawned: it gets what its parent has
        self.rank = gather.rank() if rank is None else rank
        self.ranks = gather.world_size() if ranks is None else ranks
        self._total = examples.data.samples or sum(dataset.rows for dataset in examples.datasets)

    def __len__(self) -> int:
        """Examples of this rank in an epoch, read by one worker."""
        return self._lengths(self.ranks, self.epoch)[self.rank]

    def set_epoch(self, epoch: int) -> None:
        """Read the order of this epoch at the next iteration."""
        self.epoch = self._stated = _checked_whole("epoch", epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        epoch = self.epoch
        if info is not None and self._stated is None and self.ranks == 1:
            epoch = (info.seed - info.id) % 2**20  # the same in all workers, another in each epoch
        self.epoch = epoch + 1 if self._stated is None else epoch
        streams, stream = self.ranks * workers, self.rank * workers + worker
        length = self._lengths(streams, epoch)[stream]
        first = share(self._total * epoch, streams, stream)
        examples, seed = self.examples, self.examples.seed
        if examples._process != os.getpid():
            examples._connect()
        orders = make_orders(examples.datasets, seed, streams, self.window)
        pool = ThreadPoolExecutor(_READERS, "reader")
        try:
            reader = StreamReader(examples.datasets, orders, seed, stream, first, pool)
            for start in range(0, length, _AT_ONCE):
                yield from examples.make([next(reader) for _ in range(min(_AT_ONCE, length - start))])
            if unusable := reader.take_unusable():
                reasons = ", ".join(f"{reason}: {count:,}" for reason, count in unusable.most_common())
                _LOG.warning("epoch %d: unusable rows that were replaced: %s", epoch, reasons)
        finally:
            pool.shutdown(cancel_futures=True)

    def _lengths(self, streams: int, epoch: int) -> list[int]:
        """Examples of each stream in an epoch; of equal numbers if there are several ranks."""
        ends = [[share(self._total * (epoch + n), streams, one) for one in range(streams)] for n in (0, 1)]
        lengths = [last - first for first, last in zip(*ends, strict=True)]
        return [min(lengths)] * streams if self.ranks > 1 else lengths


def _sources(datasets: Any) -> tuple[Any, dict[str, Any]]:
    """The value of ``data.datasets``, and keys that an opened dataset decides."""
    if not isinstance(datasets, ReinforcedDataset):
        if isinstance(datasets, (list, tuple)) and any(isinstance(one, ReinforcedDataset) for one in datasets):
            raise UserError(
                "datasets: want one opened dataset, or a list of URLs or {url, view}: give the URLs of these."
            )
        return datasets, {}
    source = {"url": datasets.store.url, **({} if datasets.view is None else {"view": datasets.view.name})}
    keys = {section: names for section, names in datasets.models.items() if section in Data.model_fields}
    return [source], {**keys, "images_from": [*datasets.roots.urls]}


def _models(data: Data) -> dict[str, Sequence[str] | None]:
    """The models whose targets are read, by section. Those that are no teachers are not, unless they are named."""
    sections = {str(kind.section) for kind in KINDS.values() if kind.picks is not None} - {"teachers"}
    named = {section: getattr(data, section) for section in sorted(sections)}
    return {"teachers": data.teachers, **{section: names for section, names in named.items() if names is not None}}


def _checked_whole(name: str, value: Any, least: int = 0) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise UserError(f"{name}: want a whole number of at least {least}, got {value!r:.100}")
    return number


def _checked_columns(columns: Sequence[str] | Mapping[str, str] | None, names: Sequence[str]) -> dict[str, str] | None:
    """Your name of each column with ours. Raises UserError."""
    if columns is None:
        return None
    names_given = settings.as_names(columns)
    if not isinstance(names_given, (list, dict)):
        raise UserError(f"columns: want a list of names, or a dict of your names for them, got {columns!r:.100}")
    chosen = names_given if isinstance(names_given, dict) else {name: name for name in names_given}
    if unknown := [name for name in chosen.values() if name not in names]:
        raise UserError(f"columns: there is no {unknown[0]!r}; there are: {', '.join(names)}.")
    return chosen


def _no_tokens(texts: Sequence[str]) -> torch.Tensor:
    """Tokens are made of texts by the tokenizer of the user."""
    return torch.empty(len(texts), 0)
