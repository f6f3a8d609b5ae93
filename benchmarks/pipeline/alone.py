"""Decoding and augmenting alone: the least CPU that a sample can take with the same pixels."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

from benchmarks.pipeline.inputs import make_config
from benchmarks.processes import serve
from reinforce.images.backends import load_backend, sample_augmentation
from reinforce.images.policy import decode, image_policy


def serve_decoding(pipe: Connection, augmentations: int, photos: Sequence[bytes]) -> None:
    """Answer a number of images with the CPU seconds of decoding and augmenting them; nothing is read or sent."""
    config = make_config("none.tar", "none", augmentations, 1)
    policy, images = config.augmentations, image_policy(config)
    replay, source, numbers = load_backend(policy.backend), itertools.cycle(photos), itertools.count()

    def decode_and_augment(count: int) -> float:
        start = time.process_time()
        for data, number in zip(itertools.islice(source, count), numbers, strict=False):
            image = decode(data, config.input.limits, strict=True, policy=images)
            for k in range(policy.count):
                replay(image, sample_augmentation(policy, config.seed, str(number), k, *image.size))
        return time.process_time() - start

    decode_and_augment(2)  # loads what is loaded at first use
    serve(pipe, decode_and_augment)
