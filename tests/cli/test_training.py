"""Commands that train: the config is checked before models are imported, which takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import sys
from reinforce.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    print(ended.code, sorted({"torch", "open_clip"} & {*sys.modules}))
"""


@pytest.mark.parametrize(
    ("command", "config"), [("train", "student-demo.yaml"), ("finetune-captioner", "finetune-demo.yaml")]
)
def test_errors_in_a_config_are_reported_before_models_are_imported(command: str, config: str) -> None:
    arguments = [command, f"configs/{config}", "--set", "unknown=1"]
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "unknown: unknown key" in done.stderr
    assert done.stdout.split("\n")[-2] == "2 []"
