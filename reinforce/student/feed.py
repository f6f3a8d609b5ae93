"""Batches for the training loop: datasets opened and checked, streams read by loader processes, parts put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader

from reinforce.errors import UserError
from reinforce.student.config import Data
from reinforce.student.stream import Maker, Part, Stream, Tokenize
from reinforce.student.survey import survey
from reinforce.training.task import Batch


class StudentFeed:
    """Batches as ``reinforce.student.batch`` describes them, from reinforced datasets.

    ``size`` is the side in pixels of the student's images. ``teachers`` are those whose stored vectors are read,
    instead of ``data.teachers``; for those ``online``, batches have ``views`` and ``texts``.
    """

    def __init__(
        self,
        data: Data,
        seed: int,
        size: int,
        tokenize: Tokenize,
        teachers: Sequence[str] | None = None,
        online: Sequence[str] = (),
    ) -> None:
        self._data, self._seed, self._online = data, seed, tuple(online)
        self._corpora = survey(data, seed, data.teachers if teachers is None else teachers)
        view = max(corpus.size for corpus in self._corpora) if online else None
        self._maker = Maker(size, tokenize, view)
        self._choice = self._corpora[0].choice
        self.samples: int = data.samples or sum(int(corpus.groups[:, 2].sum()) for corpus in self._corpora)

    def batches(self, rank: int, ranks: int, batch: int, start: int) -> Iterator[Batch]:
        """See ``reinforce.training.task.Feed``."""
        processes = max(1, self._data.workers)
        streams = self._data.streams or ranks * processes
        if streams % (ranks * processes):
            raise UserError(
                f"data.streams ({streams}) must be a multiple of ranks x data.workers ({ranks} x {processes})."
            )
        stream = Stream(self._corpora, self._maker, self._seed, streams, self._data.window, rank, ranks, batch, start)
        if self._data.workers == 0:
            for part in stream:
                yield self._batch([part])
            return
        loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=self._data.workers,
            prefetch_factor=self._data.prefetch,
            multiprocessing_context="forkserver",
        )
        parts = iter(loader)
        while True:
            yield self._batch([next(parts) for _ in range(processes)])

    def _batch(self, parts: Sequence[Part]) -> Batch:
        keys = [key for part in parts for key in part.keys]
        batch: dict[str, object] = {"key": keys, "image": torch.cat([part.image for part in parts])}
        tokens = torch.cat([part.tokens for part in parts], dim=1)
        batch |= {kind: tokens[i] for i, kind in enumerate(self._choice.kinds)}
        vectors = torch.cat([part.vectors for part in parts])
        targets: dict[str, dict[str, torch.Tensor]] = {}
        at = 0
        for (teacher, what), dim in self._corpora[0].targets:
            targets.setdefault(teacher, {})[what] = vectors[:, at : at + dim].contiguous()
            at += dim
        batch["targets"] = targets
        if self._online:
            view = torch.cat([part.view for part in parts if part.view is not None])
            batch["views"] = dict.fromkeys(self._online, view)
            rows = [texts for part in parts for texts in part.texts]
            batch["texts"] = {kind: [texts[i] for texts in rows] for i, kind in enumerate(self._choice.kinds)}
        return batch
