"""Incremental decoding of CoCa with few array shapes, for CUDA graphs and ``torch.compile``.

Caches stay where they are, and a step has one of a few numbers of rows, images and positions. All decisions that
depend on texts are made on the device; the host only knows how many rows there are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from teachers.coca.network import CocaNetwork
from teachers.device.accelerator import Accelerator
from teachers.device.recompilation import many_shapes
from teachers.device.step_graphs import EagerSteps, GraphedSteps, Step, Steps

Tensor = torch.Tensor
#: Numbers of rows, and of images, that steps have. The last one is the largest number of rows of a part.
SIZES = (16, 32, 64, 96, 128, 192, 256, 384, 512, 640, 768, 896, 1024)
#: Smallest number of positions that tokens attend to; larger ones are its doubles. Each compiled shape takes a minute.
_MIN_VISIBLE, _MIN_VISIBLE_COMPILED = 16, 32


class FixedCocaDecoder:
    """A ``device_sampling.DeviceDecoder`` of an open_clip CoCa.

    ``begin`` starts a batch of images and ends the previous one. Shapes are a function of the batch, whatever batches
    were before: rows are padded to one of ``SIZES``, and so are images. Padding rows belong to no image. Without
    ``compiled``, steps on CUDA are graphs if ``graphs`` is set; with it, they are compiled and then graphs.
    """

    def __init__(
        self, network: CocaNetwork, accelerator: Accelerator, compiled: bool = False, graphs: bool = True
    ) -> None:
        self.network, self._accelerator = network, accelerator
        cuda = accelerator.device.type == "cuda"
        self.steps: Steps = GraphedSteps(accelerator.device) if cuda and graphs else EagerSteps(accelerator.device)
        self._network_step = _compiled(network.step) if compiled else network.step
        self._min_visible = _MIN_VISIBLE_COMPILED if compiled else _MIN_VISIBLE
        self.cache, self.image_cache = network.text_cache(0), network.image_cache(0, 0)
        self._last_logits, self._captions = torch.zeros(0), 0
        self._places = torch.arange(network.length, device=accelerator.device)

    def bytes_per_image(self, captions: int, image_tokens: int) -> int:
        """Bytes of the caches for one image with so many captions and image tokens, and of the logits of its rows."""
        logits = 5 * captions * self.network.vocabulary_size * torch.float32.itemsize
        return self.network.bytes_per_image(captions, image_tokens) + logits

    def begin(self, images: Tensor, captions: int) -> None:
        """Start with image tokens [B, n, width] and one row per image, to be selected at most ``captions`` times."""
        self._reserve(len(images), captions, images.shape[1])
        with self._accelerator.forward():
            self.network.fill_image_cache(images, self.image_cache)
        # What a masked position holds is multiplied by 0 and must be finite.
        self.cache[: self.padded(len(images) * captions)].zero_()
        for values in (self._visible, self._hidden, self._position):
            values.zero_()
        self._filled, self._count, self._images = 0, len(images), self.padded(len(images))
        self._rows = self.padded(len(images))
        places = torch.arange(self._rows, device=self._image_of.device)
        self._image_of[: self._rows] = places.masked_fill(places >= len(images), self._images)
        self._assign_slots()

    @staticmethod
    def padded(rows: int) -> int:
        """Number of rows of a step for so many rows."""
        return next(size for size in SIZES if size >= rows)

    def launch(self, step: Step) -> None:
        """Run a step that calls ``step`` or ``_logits`` of this decoder once."""
        key = (step_name(step), self._rows, self._images, self._attended())
        self.steps.run(key, step)
        self._filled += 1

    def step(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Tokens int64 [rows, length + 1] -> logits [rows, vocabulary] after the token at ``position``, int64 [1].

        The start token comes first. Waits for nothing. ``rows`` is ``padded(rows)``.
        """
        newest = tokens.index_select(1, position).squeeze(1)
        if self.network.hiding is None:
            hidden = torch.zeros_like(newest, dtype=torch.bool)
        else:
            pad_id, back = self.network.hiding
            decides = tokens.index_select(1, (position + 1 - back).clamp(min=0)).squeeze(1)
            hidden = (decides == pad_id) & (position + 1 >= back)
        return self._logits(newest, hidden, position)

    def next_logits(self, tokens: Tensor) -> Tensor:
        """Start token and new tokens so far, int64 [rows, 1 + new tokens] -> logits [rows, vocabulary].

        They are valid until the next step.
        """
        assert tokens.shape[1] == self._filled + 1
        rows = len(tokens)
        if len(self._last_logits) != self.capacity:
            self._last_logits = tokens.new_zeros(self.capacity, self.network.vocabulary_size, dtype=self.network.dtype)
        self._newest[:rows] = tokens[:, -1]
        hiding = self.network.hiding
        if hiding is not None and tokens.shape[1] >= hiding[1]:
            self._hidden[:rows] = tokens[:, -hiding[1]] == hiding[0]
        self.launch(self._step_on_newest)
        return self._last_logits[:rows]

    def select_rows(self, rows: Tensor, used: Tensor | None = None) -> None:
        """Continue with these rows, int64 indices. A row may be selected several times.

        ``used``, bool [rows], are those whose logits will be used; all by default.
        """
        if self._filled:
            for layer in range(self.cache.shape[1]):
                values = self.cache[:, layer, :, : self._filled]
                values[: len(rows)] = values.index_select(0, rows)
            self._visible[: len(rows)] = self._visible.index_select(0, rows)
        image_of = self._image_of.index_select(0, rows)
        if used is not None:
            image_of = image_of.where(used, self._images)
        self._count, self._rows = len(rows), self.padded(len(rows))
        self._image_of[: self._count] = image_of
        self._image_of[self._count : self._rows] = self._images
        if self._rows < self._images:
            self._renumber_images(self._rows)
        self._assign_slots()

    def _logits(self, newest: Tensor, hidden: Tensor, position: Tensor) -> Tensor:
        rows, attended = self._rows, self._attended()
        self._visible[:rows].index_copy_(1, position, ~hidden[:, None])
        with self._accelerator.forward():
            return self._network_step(
                newest,
                position,
                self._slots[:rows],
                self._captions,
                self.cache[:rows],
                self.image_cache[: self._images],
                attended,
                self._visible[:rows, None, None, :attended],
                (self._places[:attended] <= position)[None],
            )

    def _step_on_newest(self) -> None:
        rows = self._rows
        self._last_logits[:rows] = self._logits(self._newest[:rows], self._hidden[:rows], self._position)
        self._position.add_(1)

    def _attended(self) -> int:
        """Number of positions that the next step's tokens attend to, under a mask."""
        attended = self._min_visible
        while attended <= self._filled:
            attended *= 2
        return min(attended, self.network.length)

    def _renumber_images(self, images: int) -> None:
        """Move the images of the rows to the front of the cache, at most ``images`` of them."""
        before = self._images
        image_of = self._image_of[: self._rows]
        in_use = image_of.new_zeros(before + 1).index_fill_(0, image_of, 1)[:before]
        order = in_use.sort(descending=True, stable=True).indices[:images]
        for layer in range(self.image_cache.shape[1]):
            self.image_cache[:images, layer] = self.image_cache[:, layer].index_select(0, order)
        new_index = (in_use.cumsum(0) - 1).index_select(0, image_of.clamp(max=before - 1))
        self._image_of[: self._rows] = new_index.where(image_of < before, images)
        self._images = images

    def _assign_slots(self) -> None:
        """Assign rows to slots by their images: those of an image are adjacent. Padding has the slot after the last."""
        image_of = self._image_of[: self._rows]
        ordered, by_image = image_of.sort(stable=True)
        rank = self._row_places[: self._rows] - torch.searchsorted(ordered, ordered)
        slots = (ordered * self._captions + rank).clamp(max=self._images * self._captions)
        self._slots.index_copy_(0, by_image, slots)

    def _reserve(self, images: int, captions: int, image_tokens: int) -> None:
        """Allocate all arrays for a batch; those of the previous batch are used again if they are large enough."""
        rows, images = self.padded(images * captions), self.padded(images)
        same = captions == self._captions and self.image_cache.shape[2] == image_tokens
        if same and rows <= len(self.cache) and images <= len(self.image_cache):
            return
        rows, images = (max(rows, len(self.cache)), max(images, len(self.image_cache))) if same else (rows, images)
        self.release()  # before the larger ones are allocated
        device, network = self._accelerator.device, self.network
        self.cache, self.image_cache = network.text_cache(rows), network.image_cache(images, image_tokens)
        self._visible = torch.zeros(rows, network.length, dtype=torch.bool, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._row_places = torch.arange(rows, device=device)
        self._image_of, self._slots, self._newest = (torch.zeros_like(self._row_places) for _ in range(3))
        self._hidden = torch.zeros(rows, dtype=torch.bool, device=device)
        self._captions = captions  # last: all are there, though any may run out of memory

    def release(self) -> None:
        """Return the memory of caches, logits and graphs. The next batch allocates what it needs."""
        self.steps.clear()  # graphs hold the addresses
        self.cache, self.image_cache = self.network.text_cache(0), self.network.image_cache(0, 0)
        self._last_logits, self._captions = torch.zeros(0), 0

    @property
    def capacity(self) -> int:
        """Rows for which there is room."""
        return len(self.cache)


def step_name(step: Step) -> str:
    return getattr(step, "func", step).__name__


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.compile`` for fixed shapes, as many as there are."""
    compiled = torch.compile(function, fullgraph=True, dynamic=False)

    def run(*arguments: Tensor | int) -> Tensor:
        with many_shapes():
            return compiled(*arguments)

    return run
