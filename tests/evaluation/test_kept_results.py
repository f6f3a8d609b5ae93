"""Results of suites: kept by the content of the set, the metric and the model, and computed side by side."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from reinforce.errors import UserError
from reinforce.evaluation.evaluator import read_content
from reinforce.evaluation.kinds import base as files
from reinforce.evaluation.kinds.base import find_files
from reinforce.evaluation.kinds.registry import KINDS
from reinforce.evaluation.suite import SetJob, SuiteReport, count_workers, file_name
from reinforce.processes.parallel import Actors
from tests.helpers.commands import Command
from tests.helpers.evaluation import (
    COLOURS,
    colour_samples,
    count_decoded,
    find_set,
    solid_image,
    stored,
    write_classification,
    write_sharegpt4v,
    write_sugarcrepe,
    write_table,
    write_urban1k,
)
from tests.helpers.models import tiny_models
from tests.helpers.waiting import processes_below, wait_for

Evaluate = Callable[..., str]
MNIST = "wds_mnist_test"
FORMER = "result of another version of the metric computed again"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return count_decoded(monkeypatch)


@pytest.fixture
def evaluate(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Evaluate models on MNIST below ``sets``, of 12 samples -> what is printed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    tiny_models.open_clip_model(tmp_path / "a" / "b")
    tiny_models.open_clip_model(tmp_path / "a-b", seed=1)
    write_classification(tmp_path / "sets", "mnist", colour_samples())

    def run(*models: str, data: str = "sets") -> str:
        words = ("--suite", "datacomp", "--data", data, "--sets", "mnist", "--out", "out")
        status, out, err = command("evaluate", *(models or ("a/b",)), *words)
        assert status == 0, err
        return out

    return run


def keep_time(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file; its size and modification time stay."""
    before, data = path.stat(), path.read_bytes()
    path.write_bytes(change(data))
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def swap_classes(text: bytes) -> bytes:
    return b"\n".join(reversed(text.strip().split(b"\n"))) + b"\n"


def swap_labels(tar: bytes) -> bytes:
    """The first two samples of a shard get each other's class."""
    blocks = [tar[start : start + 512] for start in range(0, len(tar), 512)]
    labels = [n + 1 for n, block in enumerate(blocks) if block.split(b"\0", 1)[0].endswith(b".cls")]
    first, other = labels[0], next(n for n in labels if blocks[n] != blocks[labels[0]])
    blocks[first], blocks[other] = blocks[other], blocks[first]
    return b"".join(blocks)


CHANGES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "class names": ("classnames.txt", swap_classes),
    "templates": ("zeroshot_classification_templates.txt", lambda text: text.replace(b"photo", b"image")),
    "labels of a shard": ("test/0.tar", swap_labels),
}


def test_other_content_of_equal_size_and_time_is_found(evaluate: Evaluate, tmp_path: Path, decoded: list[int]) -> None:
    evaluate()
    assert len(decoded) == 12
    for number, (what, (name, change)) in enumerate(CHANGES.items(), start=2):
        keep_time(tmp_path / "sets" / MNIST / name, change)
        assert "evaluated again, since the content has changed" in evaluate(), what
        assert len(decoded) == 12 * number, what
        assert "evaluated again" not in evaluate(), what
        assert len(decoded) == 12 * number, f"{what}: kept"


def test_a_copy_is_read_once_and_keeps_its_result(evaluate: Evaluate, tmp_path: Path, decoded: list[int]) -> None:
    expected = evaluate().splitlines()[-4:]
    shutil.copytree(tmp_path / "sets", tmp_path / "copy")
    out = evaluate(data="copy")
    assert "kept, since the content is the same" in out
    assert out.splitlines()[-4:] == expected
    assert "kept, since" not in evaluate(data="copy"), "nothing is read"
    assert "a-b 16.67" in evaluate("a/b", "a-b"), "one model is read for, the other evaluated"
    assert len(decoded) == 24


def test_results_of_another_version_of_the_metric_are_computed_again_with_a_line(
    evaluate: Evaluate, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate()
    monkeypatch.setitem(KINDS, "classification", replace(KINDS["classification"], version=10**6))
    assert f"a/b: 1 {FORMER}" in evaluate()
    assert FORMER not in evaluate()
    assert len(decoded) == 24


def test_models_never_share_a_file_of_results(evaluate: Evaluate, tmp_path: Path, decoded: list[int]) -> None:
    for models in (["a/b"], ["a-b"], ["a/b"], ["a-b"]):
        evaluate(*models)
    assert len(decoded) == 24, "each is kept"
    names = ["a/b", "a-b", "a,b", "A-b", "a--b", "-a-b", "a-b-", "a.b", "..", ".", "a/" * 200, "b/" * 200, "ä", "ö"]
    names += [file_name(name).removesuffix(".jsonl") for name in names]
    found = {file_name(name).lower() for name in names}
    assert len(found) == len({*names}), "also where a storage ignores the case of letters"
    assert all(len(name) < 128 and "/" not in name and not name.startswith(".") for name in found)
    assert file_name("mobileclip2_s0") == "mobileclip2_s0.jsonl", "as before"


def test_sets_without_times_are_read(evaluate: Evaluate, decoded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_version", lambda *_: None)
    evaluate()
    assert ["kept, since the content is the same" in evaluate() for _ in range(2)] == [True, True]
    assert len(decoded) == 12


def test_an_object_store_is_compared_by_etags(evaluate: Evaluate, tmp_path: Path, decoded: list[int], s3: Any) -> None:
    s3.put(f"{tmp_path}/sets", "bucket/evalsets", recursive=True)
    data = "s3://bucket/evalsets"
    assert "acc1: a/b" in evaluate(data=data)
    for name in ("classnames.txt", "test/0.tar"):  # the same objects again
        s3.put_file(f"{tmp_path}/sets/{MNIST}/{name}", f"bucket/evalsets/{MNIST}/{name}")
    out = evaluate(data=data)
    assert "acc1: a/b" not in out
    assert "kept, since" not in out, "nothing is read"
    assert "kept, since the content is the same" in evaluate(), "of the copy on the disk"
    keep_time(tmp_path / "sets" / MNIST / "test" / "0.tar", swap_labels)
    s3.put_file(f"{tmp_path}/sets/{MNIST}/test/0.tar", f"bucket/evalsets/{MNIST}/test/0.tar")
    assert "evaluated again, since the content has changed" in evaluate(data=data)
    assert len(decoded) == 24


def test_the_hub_is_compared_by_its_hashes() -> None:
    first, other = ({"size": 7, "blob_id": name} for name in ("a", "b"))
    assert files._version(None, "test/0.tar", first) == files._version(None, "test/0.tar", first)
    assert files._version(None, "test/0.tar", first) != files._version(None, "test/0.tar", other)
    assert files._version(None, "test/0.tar", {"size": 7}) is None


# --- the content of each layout


def write_flickr(root: Path, caption: str = "red", colour: str = "red") -> None:
    write_table(root, "flickr", {"image": [stored(solid_image(colour))], "caption": [[caption, "two"]]})


def write_winogavil(root: Path, cue: str = "red", associated: str = "c0", colour: str = "red") -> None:
    pictures = [stored(solid_image(colour)), stored(solid_image("blue"))]
    columns = {"cue": [cue], "candidate_images": [pictures]}
    write_table(root, "winogavil", columns | {"candidates": [["c0", "c1"]], "associations": [[associated]]})


def write_geode(root: Path, region: int = 0, colour: str = "red", template: str = "{c}") -> None:
    write_classification(root, "geode", [(3, solid_image(colour), (region, 0))], [*COLOURS], [template], shards=1)


LAYOUTS: dict[str, tuple[Callable[..., Any], list[dict[str, Any]]]] = {
    "flickr": (write_flickr, [{"caption": "blue"}, {"colour": "blue"}]),
    "winogavil": (write_winogavil, [{"cue": "Blue"}, {"associated": "c1"}, {"colour": "green"}]),
    "urban1k": (
        lambda root, colour="red", text="red": write_urban1k(root, {"x": (colour, text)}),
        [{"text": "blue"}, {"colour": "blue"}],
    ),
    "swap_obj": (
        lambda root, colour="red", text="red", wrong="blue": write_sugarcrepe(root, [(colour, text, wrong)]),
        [{"text": "grey"}, {"wrong": "grey"}, {"colour": "blue"}],
    ),
    "sharegpt4v-1k": (
        lambda root, colour="red", text="red": write_sharegpt4v(root, [(colour, text)]),
        [{"text": "grey"}, {"colour": "blue"}],
    ),
    "geode": (write_geode, [{"region": 1}, {"colour": "blue"}, {"template": "a {c}"}]),
}


def test_all_that_a_metric_depends_on_is_content_and_changes_the_state_of_the_files(tmp_path: Path) -> None:
    for key, (write, changes) in LAYOUTS.items():
        one = find_set(key)
        contents, states = [], []
        for number, change in enumerate([{}, {}, *changes]):
            root = tmp_path / key / str(number)
            write(root, **change)
            found = find_files(one, str(root))
            assert found is not None
            again = find_files(one, str(root))
            assert again == found, "nothing has changed"
            contents.append(read_content(one, found, 2))
            states.append(found.state)
        assert contents[0] == contents[1], f"{key}: a copy"
        assert len({*contents}) == 1 + len(changes), key
        assert len({*states}) == 2 + len(changes), key
        assert "" not in states


def test_a_file_that_is_replaced_while_a_set_is_read_leaves_no_result_that_is_kept(
    evaluate: Evaluate, tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listing is of the old file, what is read is the new one."""
    find = files.find_files
    change = partial(keep_time, tmp_path / "sets" / MNIST / "classnames.txt", swap_classes)
    monkeypatch.setattr("reinforce.evaluation.suite.find_files", lambda *a: (find(*a), change())[0])
    evaluate()
    change()
    monkeypatch.setattr("reinforce.evaluation.suite.find_files", find)
    assert "evaluated again, since the content has changed" in evaluate()
    assert len(decoded) == 24


KEYS = ["mnist", "imagenet1k", "renderedsst2"]


def test_results_are_reported_in_the_order_of_the_sets_whichever_ends_first() -> None:
    sets = [find_set(key) for key in KEYS]
    lines = {one.key: {"key": one.key, "metrics": {"main_metric": 0.5}, "notes": []} for one in reversed(sets)}
    report = SuiteReport("datacomp", 38, sets, {"model": lines}).as_json()
    assert [line["key"] for line in report["models"]["model"]["results"]] == KEYS


def test_one_accelerator_and_cpus_need_no_ray_unless_workers_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert [count_workers(given, None, "auto") for given in (None, 1, 2)] == [None, None, 2]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert [count_workers(None, None, device) for device in ("auto", "cuda", "cuda:1", "cpu")] == [8, 8, None, None]
    assert [count_workers(given, "auto", "auto") for given in (None, 3)] == [0, 3]
    with pytest.raises(UserError, match="--workers 2: each needs an accelerator of its own; --device cuda:1 is one"):
        count_workers(2, None, "cuda:1")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_workers_of_ray_have_the_results_of_one_process_also_after_one_is_killed(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_models.open_clip_model(tmp_path / "plain")
    for number, key in enumerate(("mnist", "stl10", "cifar10")):
        write_classification(tmp_path / "sets", key, colour_samples(number + 1))
    words = ("evaluate", "plain", "--suite", "datacomp", "--data", "sets", "--sets", "mnist,stl10,cifar10")

    def metrics(out: str) -> dict[str, float]:
        lines = map(json.loads, (tmp_path / out / "plain.jsonl").read_text().splitlines())
        return {line["key"]: line["metrics"] for line in lines}

    killed: list[int] = []
    call = Actors._call

    def call_and_kill(self: Actors, worker: Any, function: Any, job: SetJob) -> Any:
        begun.append(job.one.key)
        future = call(self, worker, function, job)
        if not killed:
            killed.append(kill_worker())
        return future

    begun: list[str] = []
    assert command(*words, "--out", "alone")[0] == 0
    monkeypatch.setattr(Actors, "_call", call_and_kill)
    status, out, err = command(*words, "--out", "workers", "--workers", "2")
    assert status == 0, out + err
    assert len(killed) == 1
    assert sorted(begun) == ["cifar10", "cifar10", "mnist", "stl10"], "the set of the killed worker is done again"
    assert begun[-1] == "stl10", "the largest begin first"
    assert "3 sets by 2 workers" in out + err
    assert metrics("workers") == metrics("alone")


def kill_worker() -> int:
    """Kill a process of Ray that evaluates sets -> its id."""
    wait_for(workers)
    [worker, *_] = workers()
    os.kill(worker, signal.SIGKILL)
    return worker


def workers() -> list[int]:
    """Processes of this session's Ray that evaluate sets."""
    return processes_below(os.getpid(), "ray::_MapActor")
