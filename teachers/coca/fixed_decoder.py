"""Incremental decoding of CoCa with few array shapes, for CUDA graphs and ``torch.compile``.

Caches stay where they are, and a step has one of a few numbers of rows, images and positions. All decisions that depend
on texts are made on the device; the host has only the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from teachers.coca.decoder import CocaNetwork
from teachers.decoding.sampling import Entry, entry_size
from teachers.fast_paths.recompilation import Compiler, Step, Steps, many_shapes
from teachers.runtime.accelerator import Accelerator, put_into, upload

Tensor = torch.Tensor
#: Numbers of rows, and of images, that steps have. The last one is the largest number of rows of a part.
SIZES = (16, 32, 64, 96, 128, 192, 256, 384, 512, 640, 768, 896, 1024)
#: Smallest number of positions that tokens attend to; larger ones are its doubles.
_MIN_VISIBLE = 16
#: Least images that enter by one graph; fewer take hardly less time.
_MIN_ENTERING = 8
#: Places for images, as a multiple of those that fill the rows: when some captions of an image have ended, more images
#: share the rows.
_PLACES = 1.25
#: Masks of attention have a multiple of so many positions in memory; otherwise CUDA's kernels copy them in each layer.
_ALIGNED = 16


class FixedCocaDecoder:
    """A ``device_sampling.DeviceDecoder`` of an open_clip CoCa.

    Two ways: ``begin`` starts a batch of images, all at once, for ``next_logits``; ``opened`` has a batch of any
    size, whose images ``enter`` while others leave, for ``step``. Each ends the previous batch. Shapes are a function
    of the batch, whatever batches were before: rows are padded to one of ``SIZES``, and so are images. Padding rows
    belong to no image. On CUDA, steps are graphs if ``graphs`` is set, also of what ``compile`` compiles.
    """

    def __init__(
        self, network: CocaNetwork, accelerator: Accelerator, graphs: bool = True, graphs_asked: bool = False
    ) -> None:
        self.network, self._accelerator = network, accelerator
        self.steps = Steps(accelerator.device, graphs, graphs_asked)
        self._newest_of: Callable[..., tuple[Tensor, Tensor | None, Tensor]] = newest_of
        self._masks: Callable[..., tuple[Tensor, Tensor]] = masks
        self._compiled = False
        self.cache, self.image_cache = network.text_cache(0), network.image_cache(0, 0)
        self.capacity = 0  # rows of the cache
        self._last_logits, self._captions = torch.zeros(0), 0
        self._waiting: Sequence[Tensor] = ()
        self._entering, self._entry = torch.zeros(0), torch.zeros(0)  # what graphs read: images, and where they go
        #: A step waits for nothing, but a CPU is busy until it ends.
        self.ahead = int(accelerator.device.type == "cuda")
        self._aligned = -(-network.length // _ALIGNED) * _ALIGNED
        self._positions = torch.arange(self._aligned, device=accelerator.device)
        self._seen, self._unseen = torch.tensor([0, -torch.inf], dtype=network.dtype).to(accelerator.device).unbind()

    def bytes_per_image(self, captions: int, image_tokens: int) -> int:
        """Bytes of the caches for one image with so many captions and image tokens, and of the logits of its rows."""
        logits = 5 * captions * self.network.vocabulary_size * torch.float32.itemsize
        text = self.network.bytes_per_image(captions, 0)
        image = self.network.bytes_per_image(0, image_tokens)
        return text + int(image * (_PLACES if captions > 1 else 1)) + logits

    def begin(self, images: Tensor, captions: int) -> None:
        self._reserve(self.padded(len(images) * captions), self.padded(len(images)), captions, images.shape[1])
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

    @contextmanager
    def opened(self, images: Sequence[Tensor], captions: int, at_once: int) -> Iterator[None]:
        """A batch with the image tokens [n, width] of each image, of which ``at_once`` fill the rows. None has entered
        yet."""
        self._waiting, self._filled = images, 0
        self._rows, self._images = self._shape(len(images), captions, at_once)
        try:
            self._reserve(self._rows, self._images, captions, len(images[0]))
            yield
        finally:
            self._waiting = ()

    def reserve(self, image: Tensor, captions: int, at_once: int) -> None:
        """Allocate what the largest batch of images with so many tokens [n, width] needs."""
        self._reserve(*self._shape(SIZES[-1], captions, at_once), captions, len(image))

    def room(self, images: int, captions: int) -> tuple[int, int]:
        return self._rows, self._images

    def enter(self, entry: Entry) -> None:
        count, captions = len(entry.images), self._captions
        captured = self.steps.captures("enter")
        size = max(_MIN_ENTERING, entry_size(self._images)) if captured else count
        for first in range(0, count, size):
            part = np.minimum(np.arange(first, first + size), count - 1)  # the last image is repeated
            images = [self._waiting[image] for image in entry.images[part]]
            rows = entry.rows.reshape(count, captions)[part].reshape(-1)
            where = np.concatenate([entry.places[part], rows, entry.place_of])
            if not captured:
                self._enter(torch.stack(images), upload(where, self._accelerator.device))
                continue
            if not len(self._entering):  # enough for any batch in these caches
                most = max(_MIN_ENTERING, entry_size(len(self.image_cache)))
                self._entry = self._slots.new_zeros(most * (1 + captions) + self.capacity)
                self._entering = images[0].new_zeros(most, *images[0].shape)
            torch.stack(images, out=self._entering[:size])
            put_into(self._entry, where)
            step = partial(self._enter, self._entering[:size], self._entry[: len(where)])
            self.steps.run("enter", (self._rows, self._images), step)

    def _enter(self, images: Tensor, where: Tensor) -> None:
        """Begin with image tokens [B, n, width]: ``where`` has their places, the rows of their captions, and the place
        of the image of each row."""
        places, rows, place_of = where.split([len(images), len(images) * self._captions, self._rows])
        with self._accelerator.forward():
            self.network.fill_image_cache(images, self.image_cache, places)
        # What a masked position holds is multiplied by 0 and must be finite.
        self.cache.index_fill_(0, rows, 0)
        self._visible.index_fill_(0, rows, False)
        self._image_of[: self._rows] = place_of
        self._assign_slots()

    def _shape(self, images: int, captions: int, at_once: int) -> tuple[int, int]:
        """Rows, and places for images, of a batch of which ``at_once`` images fill the rows."""
        rows = self.padded(min(images, at_once) * captions)
        places = max(SIZES[0], rows if captions == 1 else math.ceil(rows / captions * _PLACES))
        return rows, min(places, self.padded(min(images, places)))

    @staticmethod
    def padded(rows: int) -> int:
        return next(size for size in SIZES if size >= rows)

    def launch(self, step: Step, longest: int) -> None:
        """Run a step that calls ``step`` once. Texts that have not ended have at most ``longest`` new tokens."""
        self._filled = longest
        name: str = getattr(step, "func", step).__name__
        shape = name, self._rows, self._images, self._attended()
        self.steps.run("step", shape, many_shapes()(step) if self._compiled else step)
        self._filled += 1

    def run(self, kind: str, size: int, step: Step) -> None:
        self.steps.run(kind, size, step)

    def step(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Tokens int64 [rows, any length] -> logits [rows, vocabulary] after those at ``position``, int64 [rows].

        The start token comes first. A row at the position after the last has ended. Waits for nothing. ``rows`` is
        that of ``room`` or ``padded``.
        """
        return self._logits(*self._newest_of(tokens, position, self.network.hiding, self.network.length))

    def compile(self, compiler: Compiler) -> None:
        """Compile steps by parts, each once for all shapes. A graph of all blocks would take minutes; alike blocks
        share one."""
        self._compiled, network = True, self.network
        for block in (*network.text_blocks, *network.decoder_blocks, *network.cross_blocks):
            block._compiled_call_impl = compiler.for_any_rows(block._call_impl)
        network.head = compiler.for_any_rows(network.head)
        self._newest_of, self._masks = compiler.for_any_rows(newest_of), compiler.for_any_rows(masks)

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
        self.launch(self._step_on_newest, self._filled)
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
        if self._rows < self._images:  # move the images of the rows to the front of the cache
            before, self._images = self._images, self._rows
            image_of = self._image_of[: self._rows]
            in_use = image_of.new_zeros(before + 1).index_fill_(0, image_of, 1)[:before]
            order = in_use.sort(descending=True, stable=True).indices[: self._images]
            for layer in range(self.image_cache.shape[1]):
                self.image_cache[: self._images, layer] = self.image_cache[:, layer].index_select(0, order)
            new_index = (in_use.cumsum(0) - 1).index_select(0, image_of.clamp(max=before - 1))
            self._image_of[: self._rows] = new_index.where(image_of < before, self._images)
        self._assign_slots()

    def _logits(self, newest: Tensor, hidden: Tensor | None, position: Tensor) -> Tensor:
        rows, attended = self._rows, self._attended()
        constants = self._positions, self._seen, self._unseen
        both = self._masks(position, hidden, self._visible[:rows], *constants)
        text, causal = (mask[..., :attended] for mask in both)
        with self._accelerator.forward():
            return self.network.step(
                newest,
                position,
                self._slots[:rows],
                self._row_of_slot[: self._images * self._captions],
                self.cache[:rows],
                self.image_cache[: self._images],
                attended,
                text,
                causal,
            )

    def _step_on_newest(self) -> None:
        rows = self._rows
        self._last_logits[:rows] = self._logits(self._newest[:rows], self._hidden[:rows], self._position[:rows])
        self._position.add_(1)

    def _attended(self) -> int:
        """Number of positions that the next step's tokens attend to, under a mask."""
        attended = _MIN_VISIBLE
        while attended <= self._filled:
            attended *= 2
        return min(attended, self.network.length)

    def _assign_slots(self) -> None:
        """Assign rows to slots by their images: those of an image are adjacent. Padding has the last slot, which it
        reads only."""
        image_of, count = self._image_of[: self._rows], self._images * self._captions
        ordered, by_image = image_of.sort(stable=True)
        rank = self._row_places[: self._rows] - torch.searchsorted(ordered, ordered)
        slots = (ordered * self._captions + rank).clamp(max=count)
        self._row_of_slot[: count + 1].zero_().index_copy_(0, slots, by_image)
        self._slots.index_copy_(0, by_image, slots.clamp(max=count - 1))

    def _reserve(self, rows: int, images: int, captions: int, image_tokens: int) -> None:
        """Allocate all arrays for a batch; those of the previous batch are used again if they are large enough."""
        same = captions == self._captions and self.image_cache.shape[2] == image_tokens
        if same and rows <= len(self.cache) and images <= len(self.image_cache):
            return
        rows, images = (max(rows, len(self.cache)), max(images, len(self.image_cache))) if same else (rows, images)
        self.release()  # before the larger ones are allocated
        device, network = self._accelerator.device, self.network
        self.cache, self.image_cache = network.text_cache(rows), network.image_cache(images, image_tokens)
        self.capacity = rows
        self._visible = torch.zeros(rows, self._aligned, dtype=torch.bool, device=device)
        self._row_places = torch.arange(rows, device=device)
        self._position, self._newest = torch.zeros_like(self._row_places), torch.zeros_like(self._row_places)
        self._image_of, self._slots = torch.zeros_like(self._row_places), torch.zeros_like(self._row_places)
        self._row_of_slot = torch.zeros(images * captions + 1, dtype=torch.int64, device=device)
        self._hidden = torch.zeros(rows, dtype=torch.bool, device=device)
        self._captions = captions  # last: all are there, though any may run out of memory

    def release(self) -> None:
        """Return the memory of caches, logits and graphs. The next batch allocates what it needs."""
        self.steps.graphs.clear()  # graphs hold the addresses
        self.cache, self.image_cache = self.network.text_cache(0), self.network.image_cache(0, 0)
        self._entering = self._entry = self._last_logits = torch.zeros(0)
        self.capacity = self._captions = 0


def newest_of(
    tokens: Tensor, position: Tensor, hiding: tuple[int, int] | None, length: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The tokens [rows] at ``position``, whether the text tower never attends to them, and their place in the caches.

    ``hiding`` is that of the network.
    """
    newest, hidden = tokens.gather(1, position[:, None]).squeeze(1), None
    if hiding is not None:
        pad_id, back = hiding
        decides = tokens.gather(1, (position[:, None] - (back - 1)).clamp(min=0)).squeeze(1)
        hidden = (decides == pad_id) & (position >= back - 1)
    return newest, hidden, position.clamp(max=length - 1)


def masks(
    position: Tensor, hidden: Tensor | None, visible: Tensor, positions: Tensor, seen: Tensor, unseen: Tensor
) -> tuple[Tensor, Tensor]:
    """What attention of the text tower and of the decoder adds to the logits of positions, [rows, 1, 1, positions].

    ``visible``, bool [rows, positions], is written: whether the newest tokens are ``hidden``. ``positions`` counts.
    """
    causal = torch.where(positions <= position[:, None], seen, unseen)[:, None, None]
    if hidden is None:
        return causal, causal
    visible.logical_or_((positions == position[:, None]) & ~hidden[:, None])
    return torch.where(visible, seen, unseen)[:, None, None], causal
