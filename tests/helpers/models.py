"""Small models of the kind that users plug in: exact, fast, and failing on demand."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import time
from collections.abc import Sequence

import numpy as np
import torch

from teachers.protocols import ImageSpec

HALF = (0.5, 0.5, 0.5)


def _unit(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(values.float(), dim=-1)


class Colour:
    """A dual encoder by seeded projections of the pixels and of the letters' counts."""

    def __init__(self, device: torch.device, size: int = 16, dim: int = 8, seed: int = 0, delay: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.dim = dim
        self.image = ImageSpec(size, HALF, HALF)
        self.logit_scale = 30.0
        self.delay = delay
        self._pixels = torch.randn(3 * size * size, dim, generator=generator).to(device)
        self._letters = torch.randn(128, dim, generator=generator).to(device)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        if not os.path.exists(os.environ.get("TESTS_UNTIL", "")):
            time.sleep(self.delay or float(os.environ.get("TESTS_DELAY", "0")))
        return _unit(pixels.flatten(1) @ self._pixels)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        counts = torch.zeros(len(texts), 128)
        for row, text in enumerate(texts):
            for letter in text:
                counts[row, ord(letter) % 128] += 1
        return _unit((counts + 0.01) @ self._letters)


class ImageOnly:
    """An image encoder without a text side."""

    dim = 5

    def __init__(self, device: torch.device) -> None:
        self.image = ImageSpec(8, HALF, HALF)
        self._inner = Colour(device, size=8, dim=5)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._inner.encode_images(pixels)


class TextOnly:
    """A text encoder without an image side."""

    dim = 6

    def __init__(self, device: torch.device) -> None:
        self._inner = Colour(device, size=8, dim=6)

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return self._inner.encode_texts(texts)


class Trouble(Colour):
    """Does harm when a text of the batch holds a word: raise, nan, a halt, all memory, or the death of the process.

    ``once``: and makes this file, beside which it does none; ``until``: as long as there is no such file.
    """

    def __init__(
        self, device: torch.device, word: str, harm: str, once: str | None = None, until: str | None = None
    ) -> None:
        super().__init__(device, size=8, dim=4)
        self.word, self.harm, self.once, self.until = word, harm, once, until

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        out = super().encode_texts(texts)
        hit = [i for i, text in enumerate(texts) if self.word in text]
        if hit and not any(path is not None and os.path.exists(path) for path in (self.once, self.until)):
            if self.once is not None:
                with open(self.once, "w"):
                    pass
            if self.harm == "raise":
                raise RuntimeError(f"cannot stand {self.word}")
            if self.harm == "hang":
                re.match("(a+)+$", "a" * 99 + "b")  # in C, with the interpreter's lock, for longer than there are stars
            if self.harm == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.harm == "segfault":
                ctypes.string_at(0)
            if self.harm == "memory":
                _take_memory()
            out[hit] = float("nan")
        return out


def _take_memory(gigabytes: float = 4.0, seconds: float = 60.0) -> None:
    """Take so much, and hold it until someone minds; raises where nobody does."""
    taken = [np.ones(2**27, np.uint8) for _ in range(int(gigabytes * 8))]
    time.sleep(seconds)
    raise AssertionError(f"{len(taken)} pieces of 128 MiB were let have")


class Cramped(Colour):
    """Its process cannot write files above a number of bytes, as long as there is a file that says how many."""

    def __init__(self, device: torch.device, limit: str) -> None:
        super().__init__(device, size=8, dim=4)
        if os.path.exists(limit):
            with open(limit) as file:
                size = int(file.read())
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


class Poisoned(Colour):
    """From the first text with the word on, everything fails in this process, as after a fault of an accelerator."""

    def __init__(self, device: torch.device, word: str, once: str) -> None:
        super().__init__(device, size=8, dim=4)
        self.word, self.once, self.broken = word, once, False

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        if any(self.word in text for text in texts) and not os.path.exists(self.once):
            with open(self.once, "w"):
                self.broken = True
        if self.broken:
            raise RuntimeError("device-side assert triggered")
        return super().encode_texts(texts)


class Chatty(Colour):
    """Tells its token in every error, as services do."""

    def __init__(self, device: torch.device, hf_token: str, endpoint: str) -> None:
        super().__init__(device, size=8, dim=4)
        self.token, self.endpoint = hf_token, endpoint

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        if len(texts) > 1:
            raise RuntimeError(f"{self.endpoint} does not let {self.token} in")
        return super().encode_texts(texts)


class Misshapen(Colour):
    """States a dimension that it does not give."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, size=8, dim=7)
        self.dim = 6


class Namer:
    """A captioner whose texts tell its seeds."""

    def __init__(self, device: torch.device, captions: int = 2) -> None:
        self.captions = captions
        self.image = ImageSpec(8, HALF, HALF)

    def caption(self, pixels: torch.Tensor, seeds: np.ndarray) -> list[list[str]]:
        means = pixels.mean(dim=(1, 2, 3)).tolist()
        return [
            [f"a picture of {mean:.3f}, seed {int(seed) % 1000}" for seed in row]
            for mean, row in zip(means, seeds, strict=True)
        ]


class Stammerer(Namer):
    """Says something good, something long and something bad; to a first seed that four divides, bad things alone."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, captions=3)

    def caption(self, pixels: torch.Tensor, seeds: np.ndarray) -> list[list[str]]:
        good = ["good", "longer. And more.", "bad bad bad"]
        return [["no no no"] * 3 if int(row[0]) % 4 == 0 else good for row in seeds]


class Speechless(Namer):
    """Has no captions, as where logits are NaN, for a first seed that is one more than a multiple of four."""

    def caption(self, pixels: torch.Tensor, seeds: np.ndarray) -> list[list[str] | None]:
        texts = super().caption(pixels, seeds)
        return [None if int(row[0]) % 4 == 1 else text for row, text in zip(seeds, texts, strict=True)]
