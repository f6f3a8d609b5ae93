"""Captions by a server process in the code that workers run: killed and restarted, and where it never answers."""

from __future__ import annotations

import io
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

import reinforce
from reinforce.dataset.layers import captions_layer
from reinforce.dataset.store import MANIFEST, Store
from reinforce.engine.pulse import SERVER, LeaseWatch
from reinforce.engine.record import ProgressScreen, Rates, Snapshot
from reinforce.errors import UserError
from tests.helpers.chat_server import chat_server, completion, describe, image_of, start_process
from tests.helpers.data import config_of, free_port, members_of, write_tar
from tests.helpers.reinforced import reinforce_here

pytestmark = pytest.mark.skipif(find_spec("openai") is None, reason="needs the extra server")


def config(folder: Path, output: str, url: str, **options: Any) -> dict[str, Any]:
    vlm = {"family": "openai", "url": url, "model": "tiny", "prompt": "Describe.", "captions": 2, "image_size": 32}
    vlm |= {"concurrency": 4, **options}
    return config_of(f"{folder}/source/*.tar", folder / output, captioners={"vlm": vlm}, teachers={})


def captions(dataset: str) -> dict[str, list[str] | None]:
    rows: dict[str, list[str] | None] = {}
    for file in sorted(Path(dataset, captions_layer("vlm")).glob("*.parquet")):
        table = pq.read_table(file)
        rows |= dict(zip(table["key"].to_pylist(), table["captions"].to_pylist(), strict=True))
    return rows


def quarantine(dataset: str) -> dict[str, tuple[str, str]]:
    files = Path(dataset, "quarantine").rglob("*.parquet")
    return {row["key"]: (row["reason"], row["detail"]) for file in files for row in pq.read_table(file).to_pylist()}


def test_a_server_that_is_killed_and_restarted_costs_waiting_and_no_caption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for shard in range(2):
        write_tar(tmp_path / "source" / f"{shard:05d}.tar", members_of(shard, 20))
    stages = set()
    stage = LeaseWatch.stage
    monkeypatch.setattr(LeaseWatch, "stage", lambda self, *names: stages.add(names[0]) or stage(self, *names))  # type: ignore[func-returns-value]
    port, count = free_port(), tmp_path / "count"
    count.touch()
    processes = [start_process(port, count)]

    def kill_and_restart() -> None:
        while count.stat().st_size < 30:
            time.sleep(0.01)
        processes[0].kill()
        processes[0].wait()
        time.sleep(0.5)
        processes.append(start_process(port, count))

    thread = threading.Thread(target=kill_and_restart)
    thread.start()
    try:
        out = reinforce_here(config(tmp_path, "killed", f"http://127.0.0.1:{port}"))
    finally:
        thread.join()
        for process in processes:
            process.kill()
            process.wait()
    assert len(processes) == 2
    assert quarantine(out) == {}
    assert "waiting for it" in caplog.text
    assert "answers again" in caplog.text
    assert SERVER in stages
    assert captions_layer("vlm") in stages  # the step in which requests are prepared
    with chat_server(describe) as url:
        undisturbed = reinforce_here(config(tmp_path, "undisturbed", url))
    assert captions(out) == captions(undisturbed)
    assert len(captions(out)) == 40
    model = Store(out).read_json(MANIFEST)["captioners"]["vlm"]["model"]
    assert model["repeatable"] is False
    assert str(port) not in str(model)


def test_what_the_server_does_not_describe_is_null_and_quarantined_and_captions_are_cleaned(tmp_path: Path) -> None:
    red = io.BytesIO()
    Image.new("RGB", (40, 30), (255, 0, 0)).save(red, "PNG")
    write_tar(tmp_path / "source" / "0.tar", [*members_of(0, 5), ("red.png", red.getvalue()), ("red.txt", b"red")])

    def answer(_: Any, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        refuses = image_of(request).resize((1, 1)).getpixel((0, 0)) == (254, 0, 0)
        return 200, completion("I cannot describe it." if refuses else "A  thing. And more.")

    with chat_server(answer) as url:
        out = reinforce_here(config(tmp_path, "out", url, clean={"first_sentence": True, "drop": ["repetitive"]}))
    rows = captions(out)
    assert rows.pop("red") is None
    assert [*rows.values()] == [["A thing.", "A thing."]] * 5
    assert quarantine(out) == {"red": ("no_text", "vlm: the model refuses: I cannot describe it.")}


def test_a_server_that_never_answers_ends_the_run_and_quarantines_nothing(tmp_path: Path) -> None:
    write_tar(tmp_path / "source" / "0.tar", members_of(0, 2))
    with pytest.raises(UserError, match=r"captions/vlm: no server has answered for .*run the same command again"):
        reinforce_here(config(tmp_path, "out", f"http://127.0.0.1:{free_port()}", wait=0.1))
    assert quarantine(str(tmp_path / "out")) == {}


@pytest.mark.usefixtures("worker_in_process")
def test_no_remaining_time_is_shown_while_a_server_rejects_every_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teachers.server.captioner.REJECTED_SECONDS", 2.0)
    monkeypatch.setattr("reinforce.engine.driver.worker_pool.POLL_SECONDS", 0.1)
    shown: list[tuple[Snapshot, float | None]] = []
    rates = ProgressScreen.rates

    def record(screen: ProgressScreen, now: Snapshot) -> Rates:
        found = rates(screen, now)
        shown.append((now, found.eta))
        return found

    monkeypatch.setattr(ProgressScreen, "rates", record)
    for shard, size in enumerate((2, 40)):
        write_tar(tmp_path / "source" / f"{shard:05d}.tar", members_of(shard, size))

    def is_over_expected(now: Snapshot) -> bool:
        return now.shards_done == 1 and now.samples > 2 * now.samples_done

    def answer(headers: Any, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        time.sleep(0.05)
        expired = any(is_over_expected(now) for now, _ in shown)
        return (401, {"error": {"message": "key expired"}}) if expired else describe(headers, request)

    with chat_server(answer) as url:
        keys = config(tmp_path, "out", url, captions=1, concurrency=1) | {"workers": {"batch": 4, "max": 1}}
        with pytest.raises(UserError, match=r"every request is rejected .*401 - key expired"):
            reinforce.run(keys)
    times = [eta for now, eta in shown if is_over_expected(now)]
    assert len(times) > 1
    assert {*times} == {None}, "the rest of the shard is not done"
