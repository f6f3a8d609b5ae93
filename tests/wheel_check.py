"""Use the installed wheel outside the repository: `make wheel-check` runs this with the Python of a new environment.

The environment has no extra: it reads, runs and trains.

    .venv/wheel/bin/python -I tests/wheel_check.py .

The argument is the repository, of which only README.md and docs/teachers.md are read.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

EXTRAS = ("matplotlib", "sacrebleu", "tensorboard", "duckdb", "faiss", "onnx")
CAPTIONER = '''
class Colours:
    """A captioner for this check: it names the main colour of an image."""

    version = 1

    def __init__(self, device):
        from teachers.protocols import ImageSpec

        self.image = ImageSpec(size=32, mean=(0, 0, 0), std=(1, 1, 1))
        self.captions = 2

    def caption(self, pixels, seeds):
        names = ("red", "green", "blue")
        return [[f"a {names[int(image.mean((1, 2)).argmax())]} picture"] * self.captions for image in pixels]
'''
CONFIG = """
source: shards/*.tar
output: demo/dataset
augmentations: {count: 2, size: 32}
captioners: {coca: {class: "our_captioner:Colours", captions: 2}}
teachers: {conv-64: {class: "our_teachers:Tiny"}}
workers: {max: 1}
"""
STUDENT = """
output: student
student: {model: "local-dir:architecture"}
data: {datasets: demo/dataset, captioners: [coca]}
loss: {lambda: 0}
train: {steps: 2, batch: 4, optimizer: {warmup: 0}}
"""
ARCHITECTURE = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def python_blocks(page: Path) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def write_inputs(folder: Path, repository: Path) -> None:
    """Write a shard of images with captions, a config, and the teacher that docs/teachers.md shows."""
    from PIL import Image

    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "00000.tar", "w") as tar:
        for number in range(8):
            picture = io.BytesIO()
            Image.new("RGB", (40, 40), (30 * number, 255 - 30 * number, 60)).save(picture, "PNG")
            for extension, content in (("png", picture.getvalue()), ("txt", b"a colour")):
                member = tarfile.TarInfo(f"{number:05d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (folder / "my.yaml").write_text(CONFIG)
    (folder / "student.yaml").write_text(STUDENT)
    (folder / "architecture").mkdir()
    (folder / "architecture/open_clip_config.json").write_text(json.dumps({"model_cfg": ARCHITECTURE}))
    (folder / "our_captioner.py").write_text(CAPTIONER)
    (folder / "our_teachers.py").write_text(python_blocks(repository / "docs/teachers.md")[0])


def run(*words: str) -> str:
    """Run a command of the environment, show it with its output, and return the output."""
    print("$", *words, flush=True)
    program = Path(sysconfig.get_path("scripts")) / words[0]
    done = subprocess.run([str(program), *words[1:]], stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout, flush=True)
    return done.stdout


def main() -> None:
    repository = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        write_inputs(Path(name), repository)
        import reinforce

        home = Path(reinforce.__file__).resolve()
        assert repository / "reinforce" not in home.parents, f"{home} is not the installed package"
        assert "finetune-captioner" in run("reinforce", "--help")
        run("reinforce", "plan", "my.yaml")
        run("reinforce", "run", "my.yaml")
        assert "samples" in run("reinforce", "status", "demo/dataset")
        for block in python_blocks(repository / "README.md"):
            print(block)
            sys.path.insert(0, name)
            exec(compile(block, "README.md", "exec"), {"__name__": "page"})
        assert not [name for name in EXTRAS if importlib.util.find_spec(name)], f"one of {EXTRAS} is installed"
        assert "only log.jsonl: pip install -e '.[train]'" in run("reinforce", "train", "student.yaml")
        assert "loss" in Path("student/log.jsonl").read_text()
        configs = Path(sysconfig.get_path("data")) / "share/dataset-reinforcement/configs"
        assert (configs / "dfn5b.yaml").is_file(), f"{configs} has no configs"
    print(f"dataset-reinforcement {importlib.metadata.version('dataset-reinforcement')} works from {home.parent}")


if __name__ == "__main__":
    main()
