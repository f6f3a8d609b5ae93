"""The command line: one message with the mend for every fault of the user's, and an exit status that tells."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from reinforce.cli import main
from tests.helpers.data import config_of

Told = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Told:
    """Run a command -> (exit status, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        out, err = capfd.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), out, err

    return run


def write_config(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def faults(folder: Path, source: str) -> dict[str, tuple[dict[str, Any], str]]:
    """Config and what must be told, by the name of the fault."""
    good = config_of(source, folder / "out")
    (folder / "in-the-way").write_text("a file")
    return {
        "unknown key": ({**good, "teecher": {}}, "known keys here"),
        "wrong type": ({**good, "seed": "one"}, "seed: Input should be a valid integer, got 'one'"),
        "missing weights": (
            {**good, "teachers": {"mine": {"model": f"local-dir:{folder}/nowhere"}}},
            f"{folder}/nowhere",
        ),
        "missing checkpoint file": (
            {**good, "teachers": {"mine": {"model": "ViT-B-32", "pretrained": f"{folder}/none.pt"}}},
            f"{folder}/none.pt",
        ),
        "quick-gelu mismatch": (
            {**good, "teachers": {"dfn": {"model": "ViT-L-14", "pretrained": "dfn2b"}}},
            "ViT-L-14-quickgelu",
        ),
        "unknown class": ({**good, "teachers": {"mine": {"class": "tests.helpers.models:Colours"}}}, "Colours"),
        "unknown option": (
            {**good, "teachers": {"mine": {"class": "tests.helpers.models:Colour", "options": {"sice": 3}}}},
            "sice",
        ),
        "no match": ({**good, "source": f"{folder}/none/*.tar"}, f"{folder}/none/*.tar"),
        "unreadable source": ({**good, "source": f"{folder}/none/{{0..9}}.tar"}, "does not exist"),
        "unwritable output": ({**good, "output": f"{folder}/in-the-way/out"}, "cannot be written"),
    }


FAULTS = [
    "unknown key", "wrong type", "missing weights", "missing checkpoint file", "quick-gelu mismatch", "unknown class",
    "unknown option", "no match", "unreadable source", "unwritable output",
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_message_with_its_place(
    command: Told, shards: Callable[..., str], tmp_path: Path, fault: str
) -> None:
    config, told = faults(tmp_path, shards(2))[fault]
    status, out, err = command("run", write_config(tmp_path, config))
    assert status != 0
    assert err.startswith("error: ")
    assert told in err
    assert "Traceback" not in out + err
    assert not list(tmp_path.glob("out/samples/*")), "nothing was started"


def test_a_changed_fingerprint_is_told_by_run_and_plan(
    command: Told, shards: Callable[..., str], tmp_path: Path, ray_session: None
) -> None:
    config = config_of(shards(3), tmp_path / "out")
    assert command("run", write_config(tmp_path, config))[0] == 0
    path = write_config(tmp_path, {**config, "seed": 1})
    for verb in ("run", "plan"):
        status, _, err = command(verb, path)
        assert status == 2
        assert "fingerprint" in err
        assert "another `output`" in err


def test_run_plan_and_status_tell_what_is_there(
    command: Told, shards: Callable[..., str], tmp_path: Path, ray_session: None
) -> None:
    path = write_config(tmp_path, config_of(shards(4, 4), tmp_path / "out"))
    status, out, _ = command("plan", path)
    assert status == 0
    assert "2 shards, 2 with something missing" in out
    assert not (tmp_path / "out").exists(), "plan writes nothing"

    status, out, _ = command("run", path)
    assert status == 0
    assert "8 samples" in out
    assert "accelerator busy" in out

    status, out, _ = command("plan", path)
    assert "0 with something missing" in out
    status, out, _ = command("status", str(tmp_path / "out"))
    assert status == 0
    for name in ("samples", "captions/namer", "embeddings/red/images", "[2, 8] float16"):
        assert name in out
    status, out, _ = command("run", path, "--set", "teachers.red.logit_scale=75.0")
    assert (status, "nothing to do" in out) == (0, True)
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert manifest["teachers"]["red"]["logit_scale"] == 75.0, "a scale is no content: it changes without a run"
    assert manifest["teachers"]["blue"]["logit_scale"] == 30.0
    assert manifest["teachers"]["blue"]["logit_scale_from"] == "model"


def test_a_model_that_gives_the_wrong_shape_ends_the_run_before_it_starts(
    command: Told, shards: Callable[..., str], tmp_path: Path, ray_session: None
) -> None:
    config = config_of(shards(3), tmp_path / "out")
    config["teachers"] = {"odd": {"class": "tests.helpers.models:Misshapen"}}
    status, _, err = command("run", write_config(tmp_path, config))
    assert status == 2
    assert "odd" in err
    assert "(1, 7)" in err
    assert not list(tmp_path.glob("out/samples/*"))


def test_status_of_something_else_is_told(command: Told, tmp_path: Path) -> None:
    status, _, err = command("status", str(tmp_path))
    assert (status, "is not a reinforced dataset" in err) == (2, True)
