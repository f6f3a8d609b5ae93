"""Use the installed wheel outside the repository: `make wheel-check` runs this with the Python of a new environment.

The environment has no extra: it reads, runs and trains. The section of README.md on a folder of photos runs as it is,
with random weights of the model that it would download.

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


def write_photos(folder: Path) -> None:
    """Write a folder of photos, and the model for it into the cache of the Hub, which stays offline."""
    from PIL import Image
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    (folder / "photos").mkdir()
    for number in range(8):
        Image.new("RGB", (320, 240), (30 * number, 255 - 30 * number, 60)).save(folder / f"photos/{number}.jpg")
    model, commit = folder / "hub/hub/models--facebook--dinov2-small", "0" * 40
    snapshot = model / "snapshots" / commit
    Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6)).save_pretrained(snapshot)
    BitImageProcessor(size={"shortest_edge": 256}, crop_size=224, image_std=[0.2] * 3).save_pretrained(snapshot)
    (model / "refs").mkdir()
    (model / "refs/main").write_text(commit)


def commands(page: Path, heading: str) -> list[str]:
    """The commands of the first console block below a heading, without comments."""
    section = page.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    assert section.count("\n") <= 15, f"{heading} has more than 15 lines"
    (block,) = re.findall(r"^```console\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)
    return [line.partition("  #")[0].strip() for line in block.splitlines()]


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
        os.environ |= {"HF_HOME": f"{name}/hub", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        write_photos(Path(name))
        import reinforce

        home = Path(reinforce.__file__).resolve()
        assert repository / "reinforce" not in home.parents, f"{home} is not the installed package"
        install, reinforce_photos = commands(repository / "README.md", "A folder of photos")
        assert install == "pip install dataset-reinforcement"
        run(*reinforce_photos.split())
        (photo, *others) = reinforce.open("photos-reinforced", teachers=["dinov2-small"])
        assert (len(others), photo.images["dinov2-small"].shape) == (7, (2, 384))
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
