"""The benchmark of the pipeline, small: inputs, stand-ins, CPU and memory of processes, figures and their page."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import processes
from benchmarks.pipeline import page
from benchmarks.pipeline.__main__ import main
from benchmarks.pipeline.host import cpu_figures
from benchmarks.pipeline.memory import pixel_cell_bytes
from benchmarks.pipeline.stand_ins import FixedTimeTeacher, StandInAccelerator
from reinforce.processes.children import SharedMemory


@pytest.mark.slow
def test_a_small_run_measures_the_figures_of_its_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    parts = ["host"]  # the others take a minute
    main(["--quick", "--cores", "1", "--only", *parts, "--results", f"{tmp_path}/figures.json"])
    output = capsys.readouterr().out
    results = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    figures = {figure.name: figure for figure in page.read_figures(results)}
    for what in (
        "CPU per sample",
        "CPU per sample of its own process",
        "CPU per sample of its decode processes",
        "all CPU / that of decoding and augmenting alone",
        "host ceiling: 1 / CPU of its own process",
    ):
        for name in (f"{what}, 2 augmentations", f"{what}, 10 augmentations"):
            assert figures[name].value > 0, name
            assert name in output
    assert all(figure.value > 0 and figure.section for figure in figures.values())
    assert all(f"{name}: " in output for name in parts)
    assert results["quick"] is True
    assert page.render_page(page.PAGE.read_text(encoding="utf-8"), results)


def test_stand_ins_take_time_for_each_image_and_neither_cpu_nor_copies() -> None:
    teacher = FixedTimeTeacher(torch.device("cpu"), 0.02)
    assert teacher.encode_texts(["a", "b"]).shape == (2, teacher.dim)
    torch.testing.assert_close(teacher.encode_images(torch.zeros(3, 3, 4, 4)).norm(dim=-1), torch.ones(3))
    teacher.reset(0.02)
    start, cpu = time.perf_counter(), time.thread_time()
    teacher.encode_images(torch.zeros(5, 3, 4, 4))
    teacher.encode_images(torch.zeros(5, 3, 4, 4))
    assert time.perf_counter() - start >= teacher.last - teacher.first >= teacher.busy == pytest.approx(0.2)
    assert time.thread_time() - cpu < 0.1
    teacher.reset(0.0)
    assert teacher.busy == 0
    parts = [np.zeros((count, 2, 8, 8, 3), np.uint8) for count in (3, 1)]
    tensor = StandInAccelerator().put_parts(parts)
    assert (tensor.shape, tensor.flatten(0, 1).shape) == ((4, 2, 8, 8, 3), (8, 8, 8, 3))
    assert tensor.untyped_storage().nbytes() == 1, "nothing is copied"


MEGABYTE = 10**6
_BUSY = "import time; t = time.process_time\nwhile t() < {}: pass\nprint('done', flush=True); input()"
_TOUCH = """\
import sys
from reinforce.processes.children import SharedMemory
memory = SharedMemory(descriptor=int(sys.argv[1])).array()
memory[:] = 1
print("done", flush=True); input()
"""


def start(code: str, *words: str, **more: object) -> subprocess.Popen[bytes]:
    """A child that has done its work and waits."""
    child = subprocess.Popen(  # type: ignore[call-overload]
        [sys.executable, "-c", code, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **more
    )
    assert child.stdout.readline() == b"done\n"
    return child  # type: ignore[no-any-return]


def test_cpu_of_a_child_is_counted_and_waiting_is_not() -> None:
    with start(_BUSY.format(0.3)) as child:
        assert child.pid in processes.children(os.getpid())
        assert 0.25 < processes.cpu_seconds(child.pid) < 0.6
        child.kill()
    assert processes.cpu_seconds(child.pid) == 0
    assert child.returncode == -signal.SIGKILL


def test_shared_memory_of_several_processes_counts_once(request: pytest.FixtureRequest) -> None:
    shared = SharedMemory(50 * MEGABYTE)
    request.addfinalizer(shared.close)
    shared.array()[:] = 1
    here = shared.array()
    assert here.sum() == 50 * MEGABYTE  # mapped and read in this process, too
    descriptor = str(shared.descriptor)
    with start(_TOUCH, descriptor, pass_fds=[shared.descriptor]) as child:
        sizes = [processes.memory(pid) for pid in (os.getpid(), child.pid)]
        with processes.watch_memory(os.getpid(), seconds=0.01) as peak:
            child.communicate(b"\n")  # ends it
    assert 45 * MEGABYTE < sum(size.shared for size in sizes) < 90 * MEGABYTE, "twice would be 100"
    assert min(size.own for size in sizes) > MEGABYTE
    assert processes.memory(child.pid) == processes.Memory()
    assert peak.total >= peak.parent > MEGABYTE


EMPTY = "# Title\n\n<!-- figures -->\n<!-- end of figures -->\nmore\n<!-- sizing -->\nold\n<!-- end of sizing -->\n"


def test_page_is_that_of_the_stored_figures_whose_parts_are_replaced_while_the_rest_stays() -> None:
    stored: dict[str, Any] = json.loads(page.RESULTS.read_text(encoding="utf-8"))
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.render_page(text, stored) == text, "run `python -m benchmarks.pipeline --page`"
    text = page.render_page(EMPTY, {**stored, "quick": False})
    assert text.startswith("# Title\n\n<!-- figures -->\n\nMeasured on ")
    assert "<!-- end of figures -->\nmore\n<!-- sizing -->" in text
    assert "\nold\n" not in text
    assert page.render_page(text, {**stored, "quick": False}) == text
    assert "quick run" not in text
    assert "quick run" in page.render_page(EMPTY, {**stored, "quick": True})
    with pytest.raises(ValueError, match="sizing"):
        page.render_page(EMPTY.replace("end of sizing", "end"), stored)


VALUES = {
    "alone 2 ms": [6.0, 6.0, 7.0],
    "worker 2 own": [0.5, 0.4, 0.5],
    "worker 2 decode": [6.1, 6.1, 6.0],
    "worker 2 samples/s": [300.0] * 3,
    "worker 2 written": [85.0] * 3,
}


def test_figures_of_the_host_follow_from_medians_and_pixel_cells_are_those_of_two_shards() -> None:
    assert pixel_cell_bytes(2, cores=2) == 2 * (2 * 128 + 1 + 128) * 2 * 224 * 224 * 3
    assert pixel_cell_bytes(10, cores=2) == 2 * (2 * 25 + 1 + 25) * 10 * 224 * 224 * 3
    figures = {figure.name: figure for figure in cpu_figures(2, 4, VALUES)}
    overhead = figures["all CPU / that of decoding and augmenting alone, 2 augmentations"]
    assert (overhead.value, overhead.limit, overhead.met) == (pytest.approx(1.1), 1.08, False)
    ceiling = figures["host ceiling: 1 / CPU of its own process, 2 augmentations"]
    assert (ceiling.value, ceiling.limit, ceiling.met) == (2000, pytest.approx(1 / 0.0006), True)
    speed = figures["speed on 4 cores, models that take no time, 2 augmentations"]
    assert speed.limit == pytest.approx(4000 / 6)
    assert figures["CPU per sample of its decode processes, 2 augmentations"].limit == 6.0
    values = {name.replace("2", "3"): each for name, each in VALUES.items()}
    assert {figure.met for figure in cpu_figures(3, 4, values) if "own process" in figure.name} == {None}
