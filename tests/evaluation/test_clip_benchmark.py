"""Commands for the program clip_benchmark, and its results."""

from __future__ import annotations

from pathlib import Path

import pytest

from reinforce.errors import UserError
from reinforce.evaluation import clip_benchmark
from teachers.spec import ModelSpec


def write_program(folder: Path, script: str) -> str:
    """Write an executable script with the name of the program."""
    program = folder / "bin" / "clip_benchmark"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return str(program)


def test_command_names_the_model_and_the_output_as_clip_benchmark_parses_them(tmp_path: Path) -> None:
    spec = ModelSpec(model="ViT-B-32", pretrained="openai")
    arguments = clip_benchmark.build_command(spec, tmp_path / "{a}", ["wds/x"])
    named = dict(zip(arguments[2::2], arguments[3::2], strict=False))
    assert named["--pretrained_model"] == "ViT-B-32,openai"
    assert arguments[arguments.index("--output") + 1].format(dataset="x", task="y") == f"{tmp_path}/{{a}}/x_y.json"
    with pytest.raises(Exception, match="splits names at commas"):
        clip_benchmark.build_command(ModelSpec(model="local-dir:/a,b"), tmp_path)


def test_commands_start_with_the_program_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = write_program(tmp_path, "exit 0")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    specs = {"a/b": ModelSpec(model="ViT-B-32", pretrained="openai")}
    [command] = clip_benchmark.build_commands(specs, tmp_path / "results").values()
    assert command[:2] == [program, "eval"]
    assert command[-1] == f"{tmp_path}/results/a_b/{{dataset}}_{{task}}.json"


def test_a_failed_run_is_a_user_error_and_a_finished_one_returns_metrics(tmp_path: Path) -> None:
    results = tmp_path / "results"
    result = '{"dataset": "wds/vtab/pets", "metrics": {"acc1": 0.25, "acc5": NaN}}'
    command = [write_program(tmp_path, f"echo '{result}' > {results}/model/pets.json")]
    assert clip_benchmark.run(command, "model", results) == {"clip_benchmark/vtab/pets/acc1": 0.25}
    command = [write_program(tmp_path, "exit 3")]
    with pytest.raises(UserError, match=r"model: clip_benchmark ended with status 3; .* in .*/results/model\."):
        clip_benchmark.run(command, "model", results)
