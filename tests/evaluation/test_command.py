"""The command `reinforce evaluate` and the report it prints."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import yaml

from reinforce.processes.cores import available_cores
from tests.helpers import tiny_models
from tests.helpers.commands import Command
from tests.helpers.evaluation import solid_image, write_colour_folder, write_colour_shard, write_shard


@pytest.fixture
def evaluate(command: Command) -> Command:
    return partial(command, "evaluate")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, one of them in the output of a training, and sets."""
    root = tmp_path_factory.mktemp("evaluate")
    tiny_models.open_clip_model(root / "plain")
    tiny_models.open_clip_model(root / "trained" / "student", image_size=24, seed=1)
    write_colour_folder(root / "folder")
    write_colour_shard(root / "colours.tar")
    samples = [
        ("a", solid_image("red"), {"txt": "red"}),
        ("b", b"bad", {"txt": "blue"}),
        ("c", solid_image("grey"), {"txt": "g"}),
    ]
    write_shard(root / "holes.tar", samples)
    return root


def test_models_are_compared_and_refused_images_listed(evaluate: Command, root: Path, tmp_path: Path) -> None:
    models = [f"local-dir:{root}/plain", f"{root}/trained", f"{root}/trained/student"]
    sets = ["--zero-shot", f"colours={root}/folder", "--templates", "none", "--retrieval", f"holes={root}/holes.tar"]
    status, out, _ = evaluate(*models, *sets, "--json", f"{tmp_path}/out/report.json", "--batch", "4")
    assert status == 0
    for part in ("zero_shot/colours/top1", "retrieval/holes/image_to_text/r10", "zero_shot/colours: 12 images"):
        assert part in out
    assert out.startswith(f"{torch.get_num_threads()} CPU thread")
    assert f"{available_cores()} decoding thread" in out.splitlines()[0]
    assert out.count("retrieval/holes: 2 images; 1 refused: b (image_format)") == 1, "equal summaries share a line"
    report = json.loads((tmp_path / "out" / "report.json").read_text())["models"]
    assert list(report) == models
    one, other, same = (report[model] for model in models)
    assert other == same, "the output of a training is its student"
    assert one["metrics"] != other["metrics"]
    assert one["sets"]["zero_shot/colours"] == {"images": 12, "refused": []}
    (refused,) = one["sets"]["retrieval/holes"]["refused"]
    assert (refused["key"], refused["reason"]) == ("b", "image_format")
    assert f"{100 * one['metrics']['zero_shot/colours/top1']:.2f}" in out


def test_sets_of_the_config_and_the_command_line_are_merged(evaluate: Command, root: Path, tmp_path: Path) -> None:
    section: dict[str, Any] = {"zero_shot": {"a": {"images": f"{root}/folder"}, "b": {"images": "nowhere.tar"}}}
    config = tmp_path / "student.yaml"
    config.write_text(yaml.safe_dump({"output": "x", "student": {"model": "y"}, "evaluate": section}))
    b = ("--zero-shot", f"b={root}/colours.tar", "--label", "json:class", "--groups", "json:group", "--limit", "5")
    status, out, _ = evaluate(f"{root}/plain", "--config", str(config), *b)
    assert status == 0
    assert "zero_shot/a: 12 images" in out
    assert "zero_shot/b: 5 images" in out
    assert "zero_shot/b/group" in out


def test_a_remote_model_gives_the_metrics_of_a_local_one(evaluate: Command, root: Path, tmp_path: Path) -> None:
    fsspec.filesystem("memory").put(str(root / "trained"), "/run", recursive=True)
    models = [f"{root}/trained", "memory://run"]
    status, out, err = evaluate(*models, "--retrieval", f"x={root}/colours.tar", "--json", "-")
    assert status == 0
    here, there = json.loads(out)["models"].values()
    assert here == there
    assert "decoding thread" in err, "the log is on standard error"


FAULTS: dict[str, tuple[list[str], str]] = {
    "nothing to judge by": (["{root}/plain"], "nothing to evaluate on: name sets with --zero-shot"),
    "no model of that name": (["ViT-L14", "--zero-shot", "a={root}/folder"], "did you mean ViT-L-14"),
    "no weights": (["ViT-B-32", "--zero-shot", "a={root}/folder"], "has no weights without `pretrained`"),
    "no such tag": (["ViT-B-32,opnai", "--zero-shot", "a={root}/folder"], "did you mean openai"),
    "no such tag by option": (["RN50", "--pretrained", "x", "--zero-shot", "a={root}/folder"], "'x' is neither a tag"),
    "no model in the folder": (["{root}/folder", "--zero-shot", "a={root}/folder"], "its `student` has open_clip_con"),
    "missing local-dir": (["local-dir:{root}/no", "--zero-shot", "a={root}/folder"], "no does not exist"),
    "model named twice": (["{root}/plain", "{root}/plain", "--zero-shot", "a={root}/folder"], "named twice"),
    "no name of the set": (["{root}/plain", "--zero-shot", "{root}/folder"], "want NAME=URL"),
    "bad name of the set": (["{root}/plain", "--zero-shot", "a/b={root}/folder"], "'a/b' cannot name a set"),
    "missing folder": (["{root}/plain", "--zero-shot", "a={root}/none"], "shard_missing"),
    "unknown templates": (["{root}/plain", "--zero-shot", "a={root}/folder", "--templates", "x"], "use openai, simple"),
    "options without a set": (
        ["{root}/plain", "--templates", "x", "--retrieval", "a=b"],
        "apply to the sets of --zero",
    ),
    "limit of nothing": (["{root}/plain", "--zero-shot", "a={root}/folder", "--limit", "0"], "greater than or equal"),
    "unknown device": (["{root}/plain", "--zero-shot", "a={root}/folder", "--device", "abc"], "use auto, cpu, cuda"),
    "unwritable JSON": (
        ["{root}/plain", "--zero-shot", "a={root}/folder", "--json", "{root}/colours.tar/x.json"],
        "cannot be written",
    ),
}


def test_a_user_error_is_one_message(evaluate: Command, root: Path) -> None:
    for fault, (arguments, message) in FAULTS.items():
        status, out, err = evaluate(*(argument.format(root=root) for argument in arguments))
        assert status == 2, fault
        assert err.startswith("error: "), fault
        assert message in err, fault
        assert "Traceback" not in out + err, fault
