"""What a config would use is named without importing or reaching any of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from reinforce.config import parse_config
from reinforce.engine.preflight.check_machines import config_uses
from tests.helpers.commands import printed_by, run_command
from tests.helpers.data import config_of

LAB = {"class": "their_lab:Teacher", "options": {"weights": ["https://eve:pass@models.example/w.bin"]}}


def theirs(**changes: Any) -> dict[str, Any]:
    teachers = {
        "lab": LAB,
        "clip": {"model": "ViT-B-32", "pretrained": "openai"},
        "hub": {"model": "hf-hub:org/repo"},
        "siglip": {"family": "transformers", "model": "org/siglip"},
        "file": {"model": "ViT-B-32", "pretrained": "gs://weights/a.pt"},
    }
    captioners = {"words": {"class": "their_lab.words:Captioner"}}
    source = ["s3://bucket/{000..999}.tar", "simplecache::http://10.0.0.1/x.tar"]
    return {**config_of("x", "abfs://container@account/out"), "source": source, "teachers": teachers, **changes} | {
        "captioners": captioners
    }


def test_classes_hosts_buckets_hubs_and_urls_in_a_local_list_are_named(tmp_path: Path) -> None:
    own_code = {"family": "transformers", "model": "org/own", "trust_remote_code": True}
    assert config_uses(parse_config(theirs(teachers={"own": own_code}))).classes[0] == "org/own"
    uses = config_uses(parse_config(theirs()))
    assert uses.classes == ("their_lab:Teacher", "their_lab.words:Captioner")
    assert uses.places == (
        "abfs://container@account",
        "gs://weights",
        "http://10.0.0.1",
        "https://models.example",
        "huggingface.co (org/repo)",
        "huggingface.co (org/siglip)",
        "huggingface.co or the host that open_clip names (ViT-B-32, openai)",
        "s3://bucket",
    )
    (tmp_path / "urls.txt").write_text("# tars\nhttps://one.example/a.tar\nftp://two.example/b.tar\n")
    uses = config_uses(parse_config(config_of(f"{tmp_path}/urls.txt", tmp_path / "out")))
    assert uses.places == ("ftp://two.example", "https://one.example")


def test_plan_names_them_and_with_uses_imports_and_reads_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "their_lab.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(theirs(source="none/*.tar", output="out")))

    shown = printed_by(capsys, "plan", "theirs.yaml", "--uses")
    assert "runs the code of their_lab:Teacher, their_lab.words:Captioner" in shown
    assert "it reaches gs://weights" in shown
    assert not (tmp_path / "ran").exists()
    assert "their_lab" not in sys.modules
    (tmp_path / "theirs.yaml").write_text(
        yaml.safe_dump(theirs(source="none/*.tar", output="out", teachers={"lab": LAB}))
    )
    status, shown, _ = run_command(capsys, "plan", "theirs.yaml")
    assert status == 2
    assert "runs the code of their_lab:Teacher" in shown, "also before a plan that imports it"
    assert (tmp_path / "ran").exists(), "the file is what the class names"
    monkeypatch.delitem(sys.modules, "their_lab", raising=False)
