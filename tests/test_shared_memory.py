"""Memory that processes share by descriptor."""

from __future__ import annotations

import subprocess
import sys

import pytest

from reinforce.processes.shared_memory import SharedMemory


def test_what_a_child_writes_is_seen_here() -> None:
    memory = SharedMemory(8)
    code = (
        "import sys; from reinforce.processes.shared_memory import SharedMemory; "
        "SharedMemory(descriptor=int(sys.argv[1])).array()[3] = 7"
    )
    command = [sys.executable, "-c", code, str(memory.descriptor)]
    subprocess.run(command, check=True, pass_fds=[memory.descriptor])
    assert memory.array().tolist() == [0, 0, 0, 7, 0, 0, 0, 0]
    memory.close()


def test_memory_grows_and_older_arrays_stay_valid() -> None:
    memory = SharedMemory(4)
    before = memory.array()
    memory.resize(10_000)
    memory.array()[:4] = 5
    assert before.tolist() == [5] * 4
    assert memory.size == len(memory.array()) == 10_000
    memory.close()


def test_messages_of_any_length_are_written_and_read() -> None:
    memory = SharedMemory()
    assert len(memory.array()) == 0
    for data in (b"abc", bytes(range(256)) * 5000, b"x"):
        memory.write(data)
        assert memory.read(len(data)) == data
    with pytest.raises(ValueError, match="expected"):
        memory.read(memory.size + 1)
    memory.close()
