"""``reinforce status``, also while a run goes, and ``reinforce drop``: a dry run shows what ``--yes`` deletes."""

from __future__ import annotations

import json
import os
import shlex
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from reinforce.cli import dataset as cli_status
from reinforce.dataset import drop as dropping
from reinforce.dataset.manifest import read_manifest
from reinforce.dataset.runs import RunProgress
from reinforce.dataset.store import Store
from schemas import Reason
from tests.helpers.commands import Command
from tests.helpers.data import tree
from tests.helpers.reinforced import small_dataset


def report(store: Store, done: int, **changes: Any) -> None:
    """Write the progress of run ``r``, of this process."""
    worker = {"worker": 0, "host": "n1", "pid": 7, "log": "/tmp/w.err"}
    lease = {"shard": "s1", "leased": time.time() - 9, "stage": "decoding", "since": time.time() - 4}
    values = {
        "run": "r", "time": time.time(), "interval": 2.0, "started": time.time() - 60, "pid": os.getpid(),
        "host": socket.gethostname(), "shards": 2, "shards_done": done, "samples": 10 * done,
        "workers": [{**worker, "shards": [lease]}],
    }  # fmt: skip
    progress = RunProgress.model_validate({**values, **changes})
    store.write_json(progress.model_dump(mode="json"), "runs", "r", "progress.json")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """Steps that are taken one by one where --watch would sleep."""
    steps: list[Callable[[], None]] = []
    monkeypatch.setattr(cli_status.time, "sleep", lambda _: steps.pop(0)())
    monkeypatch.setattr(cli_status, "_LINE_SECONDS", 0.0)
    return steps


def end(store: Store, status: int = 0) -> Callable[[], None]:
    summary = {"run": "r", "shards": 2, "seconds": 3.0, "message": "done", "status": status}
    return lambda: store.write_json(summary, "runs", "r", "summary.json")


def test_a_running_job_is_shown_with_its_workers_before_the_layers_if_there_are_any(
    dataset: Path, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    report(Store(str(dataset)), 1, samples_per_second=5.0, eta_seconds=61.0)
    lines = command("status", str(dataset))[1].splitlines()
    assert lines[0].startswith("run r is running since 0:01:00; log: in the terminal of pid")
    assert lines[1] == "1 of 2 shards  ETA 0:01:01  10 samples  5 samples/s  1 worker"
    assert lines[2].split() == ["worker", "on", "shard", "for", "stage", "for", "log"]
    assert lines[3].split()[4:8] == ["s1", "0:00:09", "decoding", "0:00:04"]
    assert lines[4].split()[:2] == ["layer", "shards"]
    paths = [{"model": "vit", "path": "compile", "used": 1200, "plain": 4}]
    report(Store(str(dataset)), 1, fast_paths=paths)
    assert "fast paths" not in command("status", str(dataset))[1]
    details = command("status", str(dataset), "-v")[1].splitlines()
    assert details[4] == "fast paths of vit: compile 1,200 fast, 4 plain calls"
    assert json.loads(command("status", str(dataset), "--json")[1])["run"]["fast_paths"][0]["used"] == 1200
    report(Store(str(tmp_path / "new")), 0, workers=[], starting_workers=4)
    status, out, _ = command("status", str(tmp_path / "new"))
    assert (status, out.splitlines()[-1]) == (0, "there are no layers yet: workers load their models")
    found = json.loads(command("status", str(tmp_path / "new"), "--json")[1])
    assert (found["run"]["starting_workers"], found["layers"], found["shards"]) == (4, {}, 0)


def test_json_has_the_run_and_the_dataset(dataset: Path, command: Command) -> None:
    store = Store(str(dataset))
    layer = "embeddings/red/images"
    [shard, *_] = sorted(store.shards(layer))
    path = dataset / layer / f"{shard}.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    store.quarantine("samples", shard, [("k", Reason.IMAGE_BROKEN, "cut off")])
    report(store, 1, job="raysubmit_1")
    found = json.loads(command("status", str(dataset), "--json")[1])
    assert found.keys() == {
        "url", "run", "shards", "layers", "quarantine", "quarantined", "damaged", "missing", "notes", "last_run",
        "views",
    }  # fmt: skip
    assert (found["url"], found["shards"], found["last_run"]) == (str(dataset), 2, None)
    assert found["layers"][layer]["shards"] == 1
    assert [(file["layer"], file["shard"]) for file in found["damaged"]] == [(layer, shard)]
    assert found["quarantine"]["samples"]["reasons"] == {"image_broken": 1}
    run = found["run"]
    assert (run["state"], run["log_command"]) == ("running", "ray job logs raysubmit_1 --follow")
    assert run["workers"][0]["shards"][0]["stage"] == "decoding"
    end(store)()
    found = json.loads(command("status", str(dataset), "--json")[1])
    assert (found["run"], found["last_run"]["status"]) == (None, 0)


def test_watch_prints_lines_until_the_run_ends_and_exits_with_its_status(
    dataset: Path, command: Command, quick: list[Callable[[], None]]
) -> None:
    store = Store(str(dataset))
    report(store, 0)
    quick += [lambda: None, lambda: report(store, 1), end(store, status=1)]
    status, out, err = command("status", str(dataset), "--watch")
    lines = out.splitlines()
    assert (status, err) == (1, "")
    assert [line[:13] for line in lines[:2]] == ["0 of 2 shards", "1 of 2 shards"], "nothing where nothing is new"
    assert lines[2].startswith("layer"), "at the end, what is there now"
    assert "\x1b" not in out
    (dataset / "runs/r/summary.json").unlink()
    report(store, 0)
    quick += [lambda: report(store, 2), end(store)]
    status, out, _ = command("status", str(dataset), "--watch", "--json")
    assert status == 0
    assert [json.loads(line)["shards_done"] for line in out.splitlines()] == [0, 2], "a line for each report"


def test_watch_on_a_terminal_replaces_what_it_has_shown(
    dataset: Path,
    command: Command,
    quick: list[Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli_status, "Console", lambda: Console(force_terminal=True, width=120))
    store = Store(str(dataset))
    report(store, 0)
    quick += [lambda: report(store, 1), end(store)]
    _, out, _ = command("status", str(dataset), "--watch")
    rest = out.split("0 of 2 shards", 1)[1]
    assert "\x1b[1A" in rest.split("1 of 2 shards")[0], "the cursor goes up"
    assert "decoding" in rest


def test_watch_ends_with_an_error_once_the_run_does_not_report_any_more_or_is_interrupted(
    dataset: Path, command: Command, quick: list[Callable[[], None]]
) -> None:
    store = Store(str(dataset))
    assert "no run has begun in" in command("status", str(dataset), "--watch")[2]
    report(store, 1)
    quick += [lambda: report(store, 1, pid=2**22 + 1)]
    status, out, err = command("status", str(dataset), "--watch")
    assert status == 2
    assert "1 of 2 shards" in out
    assert "was probably killed" in err
    assert command("status", str(dataset))[1].startswith("run r has not reported for ")

    def interrupt() -> None:
        raise KeyboardInterrupt

    report(store, 1)
    quick.append(interrupt)
    status, out, err = command("status", str(dataset), "--watch")
    assert (status, err, out.splitlines()) == (130, "", ["1 of 2 shards  10 samples  1 worker"])


def test_status_shows_an_example_of_each_reason_when_asked(dataset: Path, command: Command) -> None:
    [shard, *_] = sorted(Store(str(dataset)).shards("samples"))
    rows = [("k\x1b", Reason.IMAGE_BROKEN, "the file ends early"), (None, Reason.SHARD_DAMAGED, "at byte 9")]
    Store(str(dataset)).quarantine("samples", shard, rows)
    counts = "quarantine/samples: 1 shard; 1 image_broken, 1 shard_damaged (shard)"
    out = command("status", str(dataset))[1].splitlines()
    assert out[-2:] == [counts, f"`reinforce status {dataset} --reasons` shows an example of each reason"]
    out = command("status", str(dataset), "--reasons")[1].splitlines()
    assert out[-3:] == [
        counts,
        f"  image_broken, for example {shard}: k\\x1b: the file ends early",
        f"  shard_damaged (shard), for example {shard}: at byte 9",
    ]


def test_quarantined_samples_are_counted_once_and_grouped_before_what_the_last_run_found(
    dataset: Path, command: Command
) -> None:
    store = Store(str(dataset))
    [shard, *_] = sorted(store.shards("samples"))
    store.quarantine("samples", shard, [("a", Reason.IMAGE_BROKEN, ""), ("b", Reason.NO_TEXT, "")])
    for layer, keys in (("embeddings/blue/caption", "bc"), ("embeddings/red/caption", "bc")):
        store.quarantine(layer, shard, [(key, Reason.NO_TEXT, "") for key in keys])
    out = command("status", str(dataset))[1].splitlines()
    assert out[-5:-1] == [
        "quarantine/samples: 1 shard; 1 image_broken, 1 no_text",
        "quarantine/embeddings/red/caption: 1 shard; 1 no_text",
        "quarantine of 2 layers computed from these: 3 rows of the same samples",
        "quarantined in all: 3 samples",
    ]
    absent = {"finished": 0, "quarantined": 1, "first_finished": None, "first_quarantined": "samples/old-ab"}
    rates = {"busy_share": 0.5, "stages": {"captions/c": {"inputs": 30, "seconds": 3.0, "per_second": 10.0}}}
    last = {"run": "2026", "shards": 2, "seconds": 1.0, "message": "done", "not_in_source": absent, **rates}
    store.write_json(last, "runs", "2026", "summary.json")
    out = command("status", str(dataset), "-v")[1].splitlines()
    assert out[-4:-1] == [
        "last run 2026: 2 shards in 1 s, done",
        "models busy 50%",
        "  captions/c: 30 captions, 10 captions/s",
    ]
    assert out[-1].startswith("not in `source`: 1 quarantined shard, such as samples/old-ab. ")
    paths = [{"model": "c", "path": "graphs", "asked": True, "reason": "no\x1b[2Jmemory"}]
    store.write_json({**last, "fast_paths": paths}, "runs", "2026", "summary.json")
    assert command("status", str(dataset), "-v")[1].splitlines()[-1].startswith("fast paths of c: graphs (off: no")
    assert "\x1b" not in command("status", str(dataset), "-v")[1]
    store.write_json({**last, "fast_paths": [{"model": "c"}]}, "runs", "2026", "summary.json")
    status, _, err = command("status", str(dataset), "-v")
    assert (status, "fast_paths.0.path: Field required. Delete it." in err) == (2, True)


def test_a_usual_dataset_fits_a_screen(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("dfn2b", "dfn2b-s39b", "siglip2-so400m")
    teachers = {name: {"class": "tests.helpers.models:ColorTeacher"} for name in names}
    captioners = {"coca": {"class": "tests.helpers.models:SeedCaptioner", "captions": 2}}
    store = Store(small_dataset(tmp_path, (3,), teachers=teachers, captioners=captioners))
    [shard] = store.shards("samples")
    layers = read_manifest(store)["layers"]
    stages = {layer: {"inputs": 30, "seconds": 3.0, "per_second": 10.0} for layer in layers if layer != "samples"}
    last = {"run": "20261127T224904Z-36533a", "shards": 1, "seconds": 9.0, "message": "done", "stages": stages}
    store.write_json(last, "runs", "2026", "summary.json")
    refused = [(f"{number}", Reason.IMAGE_BROKEN if number else Reason.IMAGE_FORMAT, "") for number in range(16)]
    for layer in layers:
        store.quarantine(layer, shard, refused)
    store.quarantine("captions/coca", shard, [*refused, ("x", Reason.NO_TEXT, "")])
    monkeypatch.setenv("COLUMNS", "80")
    out = command("status", store.url)[1].replace(str(tmp_path), "s3://my-bucket").splitlines()
    assert sum(-(-len(line) // 80) for line in out) <= 23, "and the prompt"
    assert out[-1] == "models busy 0%; -v shows the speed of each layer"
    assert len(command("status", store.url, "-v")[1].splitlines()) == len(out) + len(stages)


def test_a_dry_run_shows_files_and_bytes_and_the_command_that_deletes_also_after_an_interruption(
    dataset: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(dataset, layers_only=False)
    status, out, err = command("drop", str(dataset), "embeddings/red/*")
    *shown, last = out.splitlines()
    assert (status, err) == (0, "")
    size = sum(len(data) for name, data in before.items() if name.startswith("embeddings/red/"))
    assert shown[-2:] == ["dataset.json: the entry teachers.red", f"in total: 6 files ({size / 1024:.1f} KiB)"]
    assert last == f"nothing was deleted; to delete: reinforce drop {dataset} 'embeddings/red/*' --yes"
    assert tree(dataset, layers_only=False) == before

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    delete = shlex.split(last.partition("reinforce ")[2])
    with monkeypatch.context() as patch:
        patch.setattr(dropping, "_remove_entry", interrupt)
        status, _, err = command(*delete)
    assert (status, err) == (130, "stopped; run the same command again to delete the rest\n")
    status, out, _ = command(*delete)
    assert (status, out.splitlines()[-1]) == (0, "deleted")
    assert not any("/red/" in name for name in tree(dataset))


def test_a_dry_run_names_what_depends_on_the_layers_and_the_full_command(dataset: Path, command: Command) -> None:
    for options in ([], ["--yes"]):
        status, out, err = command("drop", str(dataset), "captions/namer", *options)
        assert status == 2
        assert out.splitlines()[-2:] == [
            "depends on this: embeddings/blue/namer",
            "depends on this: embeddings/red/namer",
        ]
        full = f"reinforce drop {dataset} embeddings/blue/namer embeddings/red/namer captions/namer"
        assert err.strip().endswith(f"Name them, too: {full}")
    assert command(*shlex.split(full)[1:], "--yes")[0] == 0
    assert not any("namer" in name for name in tree(dataset))


def test_a_damaged_file_is_shown_and_set_aside_after_a_dry_run(dataset: Path, command: Command) -> None:
    layer = "embeddings/red/images"
    [shard, *_] = sorted(Store(str(dataset)).shards(layer))
    path = dataset / layer / f"{shard}.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    out = command("status", str(dataset))[1]
    fix = f"reinforce drop {dataset} {layer} --shard {shard}"
    assert f"1 file is damaged ({layer}/{shard}.parquet: it is not a Parquet file, or it is cut off)" in out
    assert f"{fix} --yes" in out
    assert "1/2" in next(line for line in out.splitlines() if line.startswith(layer))

    before = tree(dataset, layers_only=False)
    status, out, _ = command(*shlex.split(fix)[1:])
    assert status == 0
    assert out.splitlines() == [str(path), f"nothing was moved; to move to set-aside/: {fix} --yes"]
    assert {k: v for k, v in tree(dataset, layers_only=False).items() if k != ".tmp/lock"} == before
    status, out, _ = command(*shlex.split(fix)[1:], "--yes")
    assert status == 0
    assert not path.exists()
    assert [str(moved) for moved in (dataset / "set-aside" / layer).iterdir()] == [
        out.splitlines()[0].removeprefix("moved to ")
    ]
    assert "damaged" not in command("status", str(dataset))[1]
