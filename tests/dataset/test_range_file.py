"""Files that are read by ranges, and the requests that this takes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from reinforce.dataset.files.range_file import RangeFile

DATA = bytes(range(200))


class Recorded:
    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []

    def cat_file(self, path: str, *, start: int, end: int) -> bytes:
        self.ranges.append((start, end))
        return DATA[start:end]


def read(file: RangeFile, start: int, length: int) -> bytes:
    file.seek(start)
    return file.read(length)


def test_the_end_of_a_file_and_its_last_range_are_requested_once() -> None:
    fs = Recorded()
    file = RangeFile(fs, "x", 200)
    for start, length in ((150, 50), (160, 10), (10, 20), (12, 5), (10, 20), (190, 30)):
        assert read(file, start, length) == DATA[start : min(200, start + length)]
    assert fs.ranges == [(150, 200), (10, 30)]
    assert read(file, 200, 5) == b""
    assert read(file, 40, 5) == DATA[40:45]
    assert read(file, 12, 5) == DATA[12:17], "only the last range is kept"
    assert fs.ranges[2:] == [(40, 45), (12, 17)]


def test_a_local_file_is_read_and_a_pipe_does_not_block(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)
    assert read(RangeFile(None, str(tmp_path / "file"), 200), 20, 9) == DATA[20:29]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="Illegal seek"):
        read(RangeFile(None, str(tmp_path / "pipe"), 200), 20, 9)
