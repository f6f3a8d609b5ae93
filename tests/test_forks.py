"""Processes that are forks of one process get the files that they were started with, under the same numbers."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.helpers import forks


@pytest.fixture
def numbers_up_to(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every number of a file below the parameter is taken, so that the next files have numbers from it on."""
    opened = []
    while (file := os.open(os.devnull, os.O_RDONLY)) < request.param:
        opened.append(file)
    os.close(file)
    yield
    for file in opened:
        os.close(file)


@pytest.mark.skipif(sys.platform != "linux", reason="on other systems no test starts forks")
@pytest.mark.parametrize("numbers_up_to", range(97, 107), indirect=True)
@pytest.mark.usefixtures("numbers_up_to")
def test_a_fork_has_the_files_that_it_was_started_with_whatever_their_numbers() -> None:
    pairs = [os.pipe() for _ in range(4)]
    script = "import os, sys\nfor number in sys.argv[1:]: os.write(int(number), number.encode())"
    command = [*forks.worker_command(os.environ[forks.ADDRESS]), "-c", script]
    written = [write for _, write in pairs]
    subprocess.run([*command, *map(str, written)], pass_fds=written, check=True, timeout=120)
    for read, write in pairs:
        os.close(write)
        with open(read, "rb") as file:
            assert file.read() == str(write).encode()


@pytest.mark.skipif(sys.platform != "linux", reason="on other systems no test starts forks")
@pytest.mark.parametrize("numbers_up_to", range(98, 106), indirect=True)
@pytest.mark.usefixtures("numbers_up_to")
def test_a_process_with_many_open_files_spawns_others() -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=answers.put, args=(os.getpid(),))
    process.start()
    process.join(120)
    assert not answers.empty()
    assert answers.get() == os.getpid()
