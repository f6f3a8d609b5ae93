"""A link between two network namespaces that can delay and lose frames, for kernels without ``tc netem``.

``python -m drills.soak.cable SPACE NAME SPACE NAME`` makes a TAP device in each namespace, prints a line, and carries
frames between them until it is killed. A line ``MILLISECONDS PERCENT`` on its standard input sets what happens to the
frames of the second device.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import selectors
import struct
import sys
import time

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_TUNSETIFF, _TAP_WITHOUT_HEADER = 0x400454CA, 0x1002
_FRAME_BYTES = 65_536


def tap(space: str, name: str) -> int:
    """Make a TAP device in a namespace, which this process enters -> its file descriptor."""
    namespace = os.open(f"/run/netns/{space}", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _NEW_NETWORK):
        raise OSError(ctypes.get_errno(), f"setns {space}")
    os.close(namespace)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP_WITHOUT_HEADER))
    return device


def carry(near: int, far: int) -> None:
    """Carry frames in both directions. Those of ``far`` are delayed, in their order, and lost at random."""
    delay, loss, rng = 0.0, 0.0, random.Random(0)
    waiting: list[tuple[float, int, bytes]] = []
    ready = selectors.DefaultSelector()
    for file in (near, far, sys.stdin.fileno()):
        ready.register(file, selectors.EVENT_READ)
    count = 0
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for key, _ in ready.select(pause):
            if key.fd == sys.stdin.fileno():
                if not (line := os.read(key.fd, 100).split()):
                    return
                delay, loss = float(line[-2]) / 1000, float(line[-1]) / 100
                continue
            frame = _read(key.fd)
            if key.fd == near:
                _write(far, frame)
            elif rng.random() >= loss:
                count += 1
                heapq.heappush(waiting, (time.monotonic() + delay, count, frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _write(near, heapq.heappop(waiting)[2])


def _read(device: int) -> bytes:
    try:
        return os.read(device, _FRAME_BYTES)
    except OSError:  # the device is down
        return b""


def _write(device: int, frame: bytes) -> None:
    """Write a frame; one that the device cannot take is lost."""
    try:
        if frame:
            os.write(device, frame)
    except OSError:
        return


if __name__ == "__main__":
    ends = [tap(*sys.argv[1:3]), tap(*sys.argv[3:5])]
    print("ready", flush=True)
    carry(*ends)
