"""Toy models of tests: here custom classes that are exact, fast and failing on demand; the modules have others.

Their names are in fingerprints, those of tests/golden among them: classes that configs name stay where they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from reinforce.engine.worker.self_test import TEXTS
from teachers.fast_paths.usage import enabled, fast_path
from teachers.protocols import ImageSpec

HALF = (0.5, 0.5, 0.5)
SELF_TEST = 9  # batches of images in the self-test of a loaded model


def _unit(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(values.float(), dim=-1)


class ColorTeacher:
    """A dual encoder: seeded projections of the pixels and of the letter counts.

    An image batch of a shard takes ``delay`` (or $TESTS_DELAY) seconds, until the file $TESTS_UNTIL exists.
    """

    def __init__(self, device: torch.device, size: int = 16, dim: int = 8, seed: int = 0, delay: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.dim = dim
        self.image = ImageSpec(size, HALF, HALF)
        self.logit_scale = 30.0
        self.delay = delay
        self._self_test = iter(range(SELF_TEST))
        self._pixels = torch.randn(3 * size * size, dim, generator=generator).to(device)
        self._letters = torch.randn(128, dim, generator=generator).to(device)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        if next(self._self_test, None) is None and not os.path.exists(os.environ.get("TESTS_UNTIL", "")):
            time.sleep(self.delay or float(os.environ.get("TESTS_DELAY", "0")))
        return _unit(pixels.flatten(1) @ self._pixels)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        counts = torch.zeros(len(texts), 128)
        for row, text in enumerate(texts):
            letters = torch.tensor([ord(letter) % 128 for letter in text], dtype=torch.int64)
            counts[row] = letters.bincount(minlength=128)
        return _unit((counts + 0.01).to(self._letters.device) @ self._letters)


class PathTeacher(ColorTeacher):
    """Counts its images as calls of a fast path, its texts as plain ones, and has another path that falls back."""

    def __init__(self, device: torch.device, **options: Any) -> None:
        super().__init__(device, **options)
        if enabled():
            fast_path("held_weights").fall_back("outputs would change")
            self._path = fast_path("compile", asked=True)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        if enabled():
            self._path.used += 1
        return super().encode_images(pixels)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        if enabled():
            self._path.plain += 1
        return super().encode_texts(texts)


class SparseTeacher(ColorTeacher):
    """The first half is 0 for texts with ``2`` or ``5``, and for images whose largest is in the other."""

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        values = super().encode_images(pixels).clone()
        values[values.argmax(dim=1) >= self.dim // 2, : self.dim // 2] = 0
        return _unit(values)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        values = super().encode_texts(texts).clone()
        values[[bool({*"25"} & {*text}) for text in texts], : self.dim // 2] = 0
        return _unit(values)


class ImageOnly:
    """An image encoder without a text side."""

    dim = 5

    def __init__(self, device: torch.device) -> None:
        self.image = ImageSpec(8, HALF, HALF)
        self._inner = ColorTeacher(device, size=8, dim=5)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._inner.encode_images(pixels)


class TextOnly:
    """A text encoder without an image side."""

    dim = 6

    def __init__(self, device: torch.device) -> None:
        self._inner = ColorTeacher(device, size=8, dim=6)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return self._inner.encode_texts(texts)


class FailingTeacher(ColorTeacher):
    """Fails when a text of the batch contains ``trigger``.

    ``failure`` is raise, exit, nan, hang, kill, segfault or memory. With ``once`` it fails a single time: it creates
    this file and does not fail while the file exists. With ``until`` it fails until this file exists.
    """

    def __init__(
        self, device: torch.device, trigger: str, failure: str, once: str | None = None, until: str | None = None
    ) -> None:
        super().__init__(device, size=8, dim=4)
        self.trigger, self.failure, self.once, self.until = trigger, failure, once, until

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        out = super().encode_texts(texts)
        rows = [i for i, text in enumerate(texts) if self.trigger in text]
        if rows and not any(path is not None and os.path.exists(path) for path in (self.once, self.until)):
            if self.once is not None:
                with open(self.once, "w"):
                    pass
            if self.failure == "raise":
                raise RuntimeError(f"cannot encode {self.trigger}")
            if self.failure == "exit":
                sys.exit(f"cannot encode {self.trigger}")
            if self.failure == "hang":
                ctypes.PyDLL(None).sleep(3600)  # in C, holding the interpreter lock
            if self.failure == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.failure == "segfault":
                ctypes.string_at(0)
            if self.failure == "memory":
                _allocate()
            out[rows] = float("nan")
        return out


def _allocate(gigabytes: float = 6.0, seconds: float = 60.0) -> None:
    """Allocate memory and hold it until the process is killed. Raises AssertionError if nothing kills it."""
    blocks = [np.ones(2**27, np.uint8) for _ in range(int(gigabytes * 8))]
    time.sleep(seconds)
    raise AssertionError(f"nothing killed a process that held {len(blocks)} blocks of 128 MiB")


class HangingLoadTeacher(ColorTeacher):
    """Creates the file ``used`` when it encodes, and hangs when it is loaded while that exists.

    Before it hangs, it removes that file if the file ``once`` exists.
    """

    def __init__(self, device: torch.device, used: str, once: str) -> None:
        super().__init__(device, size=8, dim=4)
        self.used = used
        if os.path.exists(used):
            if os.path.exists(once):
                os.remove(used)
            ctypes.PyDLL(None).sleep(3600)  # in C, holding the interpreter lock

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > 1:  # not in a test of the model
            with open(self.used, "w"):
                pass
        return super().encode_images(images)


class FileLimitTeacher(ColorTeacher):
    """Its process cannot write files larger than the number of bytes in the file ``limit``, if that file exists."""

    def __init__(self, device: torch.device, limit: str) -> None:
        super().__init__(device, size=8, dim=4)
        if os.path.exists(limit):
            with open(limit) as file:
                size = int(file.read())
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


class BrokenDeviceTeacher(ColorTeacher):
    """Fails always in one process after the first text that contains ``trigger``, like a broken accelerator."""

    def __init__(self, device: torch.device, trigger: str, once: str) -> None:
        super().__init__(device, size=8, dim=4)
        self.trigger, self.once, self.broken = trigger, once, False

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        if any(self.trigger in text for text in texts) and not os.path.exists(self.once):
            with open(self.once, "w"):
                self.broken = True
        if self.broken:
            raise RuntimeError("device-side assert triggered")
        return super().encode_texts(texts)


class TokenLeakingTeacher(ColorTeacher):
    """Quotes its token in every error, as some services do. It fails at batches of texts after the self-test."""

    def __init__(self, device: torch.device, hf_token: str, endpoint: str) -> None:
        super().__init__(device, size=8, dim=4)
        self.token, self.endpoint = hf_token, endpoint

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        if len(texts) > 1 and not {*texts} <= {*TEXTS}:
            raise RuntimeError(f"{self.endpoint} does not accept {self.token}")
        return super().encode_texts(texts)


class PrintingTeacher(ColorTeacher):
    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        print("printed by a worker", flush=True)


class WrongShapeTeacher(ColorTeacher):
    """Declares a dimension that differs from its embeddings'."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, size=8, dim=7)
        self.dim = 6


class SeedCaptioner:
    """A captioner whose texts contain the image's mean and the seed."""

    def __init__(self, device: torch.device, captions: int = 2) -> None:
        self.captions = captions
        self.image = ImageSpec(8, HALF, HALF)

    def caption(self, pixels: torch.Tensor, seeds: np.ndarray) -> list[list[str]]:
        means = pixels.mean(dim=(1, 2, 3)).tolist()
        return [
            [f"a picture of {mean:.3f}, seed {int(seed) % 1000}" for seed in row]
            for mean, row in zip(means, seeds, strict=True)
        ]


class GroupCaptioner(SeedCaptioner):
    """Writes the same texts for the images of a row group together, of which ``limit`` fit in memory at once."""

    by_group = True
    decoded: ClassVar[list[int]] = []  # the images of each group

    def __init__(self, device: torch.device, captions: int = 2, limit: int = 1000) -> None:
        super().__init__(device, captions)
        self.limit = limit

    def draw(self, seeds: np.ndarray) -> np.ndarray:
        return (seeds % 1000)[..., None]

    def generate(self, pixels: torch.Tensor, seeds: np.ndarray) -> list[Any]:
        return self.decode(list(self.encode(pixels)), self.draw(seeds), len(pixels))

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean(dim=(1, 2, 3))

    def decode(self, images: list[torch.Tensor], seeds: np.ndarray, at_once: int) -> list[Any]:
        if at_once > self.limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        self.decoded.append(len(images))
        return [[(float(mean), int(seed)) for seed in row] for mean, row in zip(images, seeds[..., 0], strict=True)]

    def to_texts(self, tokens: list[Any]) -> list[list[str]]:
        return [[f"a picture of {mean:.3f}, seed {seed}" for mean, seed in row] for row in tokens]


class RepetitiveCaptioner(SeedCaptioner):
    """Returns a good, a long and a repetitive text; only repetitive ones where 4 divides the first seed."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, captions=3)

    def caption(self, pixels: torch.Tensor, seeds: np.ndarray) -> list[list[str]]:
        mixed = ["good", "longer. And more.", "bad bad bad"]
        return [["no no no"] * 3 if int(row[0]) % 4 == 0 else mixed for row in seeds]


class NanCaptioner(SeedCaptioner):
    """Returns None, as for NaN logits, where the first seed is 1 modulo 4."""

    def caption(self, pixels: torch.Tensor, seeds: np.ndarray) -> list[list[str] | None]:
        texts = super().caption(pixels, seeds)
        return [None if int(row[0]) % 4 == 1 else text for row, text in zip(seeds, texts, strict=True)]


class FullNodeTeacher(ColorTeacher):
    """Cannot write temporary files on one node: that of the first worker that runs it, which ``marker`` names."""

    def __init__(self, device: torch.device, marker: str, delay: float) -> None:
        super().__init__(device, size=8, dim=4, delay=delay)
        self.marker = marker

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        if not set(texts) <= set(TEXTS):
            import ray

            node = ray.get_runtime_context().get_node_id()
            with contextlib.suppress(FileExistsError), open(self.marker, "x") as file:
                file.write(node)
            if Path(self.marker).read_text() in ("", node):
                raise OSError(errno.ENOSPC, "No space left on device")
        return super().encode_texts(texts)


class PixelRecorder:
    """A teacher for images of 24 x 24 pixels that keeps those it is given, uint8 [24, 24, 3]."""

    dim = 2
    logit_scale = 1.0
    seen: ClassVar[list[np.ndarray]] = []

    def __init__(self, device: torch.device) -> None:
        self.image = ImageSpec(24, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen.extend((pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
        return torch.tensor([[1.0, 0.0]]).repeat(len(pixels), 1)
