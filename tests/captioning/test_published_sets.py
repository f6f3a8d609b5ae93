"""Configs of the sets that the published captioners were fine-tuned on, and the layouts in which these are published.

Each set is a stand-in of a few pictures, in the layout and with the fields of its publisher.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from reinforce import settings
from reinforce.captioning.config import CaptionerConfig
from reinforce.captioning.data import PairSource
from reinforce.errors import UserError
from reinforce.source.samples import RawSample
from tests.helpers.data import picture, write_tar
from tests.helpers.demo import ROOT
from tests.helpers.pages import blocks
from tests.helpers.tables import write_huggingface

COUNT = 24


def write_files(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(picture(number, 9, 9))


def write_coco(root: Path) -> None:
    """``captions_train2017.json``, of which every third picture has another licence, and ``train2017``."""
    names = [f"{number:012d}.jpg" for number in range(COUNT * 3 // 2)]
    write_files(root / "coco/train2017", names)
    licences = [(4, 5, 3)[number % 3] for number in range(len(names))]
    images = [
        {"license": licence, "file_name": name, "coco_url": f"http://images.cocodataset.org/{name}", "id": number}
        for number, (name, licence) in enumerate(zip(names, licences, strict=True))
    ]
    annotations = [
        {"image_id": number, "id": 10 * number + n, "caption": f"caption {n} of {number}\n"}
        for n in range(2)
        for number in range(len(names))
    ]
    (root / "coco/annotations").mkdir()
    document = {"info": {"year": 2017}, "licenses": [], "images": images, "annotations": annotations}
    (root / "coco/annotations/captions_train2017.json").write_text(json.dumps(document))


def write_docci(root: Path) -> None:
    """``docci_descriptions.jsonlines`` of all splits, and ``images``."""
    names = [f"{split}_{number:05d}" for split in ("train", "test", "qual_dev") for number in range(COUNT)]
    write_files(root / "docci/images", [f"{name}.jpg" for name in names])
    rows = [
        {
            "split": name.rpartition("_")[0],
            "image_file": f"{name}.jpg",
            "example_id": name,
            "description": f"About {name}",
        }
        for name in names
    ]
    (root / "docci/docci_descriptions.jsonlines").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_dci(root: Path) -> None:
    """A JSON file in ``complete`` for each picture in ``photos``, of another name, with its masks."""
    folder = root / "densely_captioned_images"
    write_files(folder / "photos", [f"sa_{number}.jpg" for number in range(COUNT)])
    (folder / "complete").mkdir()
    texts: list[dict[str, str]] = [{}, {"label": "Tree", "caption": "Green leaves."}, {"label": "Sky"}]
    masks: dict[str, dict[str, str | int]] = {
        str(n): {"idx": str(n), "outer_mask": "iVBORw0K", "mask_quality": (n + 2) % 3, **texts[n]} for n in (1, 2, 0)
    }
    for number in range(COUNT):
        masks["1"]["outer_mask"] = "iVBORw0K" * (140_000 if number == 0 else 1)  # more than a limit's default
        entry = {"image": f"sa_{number}.jpg", "short_caption": f"A pump {number}.", "mask_data": masks}
        extra = {"extra_caption": "" if number == 1 else f"It is old.\nVery {number}.", "mask_keys": ["1", "2", "0"]}
        summaries = {"summaries": {"base": ["short"]}, "negatives": {"base": {"swaps": ["no pump"]}}}
        (folder / f"complete/{1000 - number}.json").write_text(json.dumps({**entry, **extra, **summaries}))


def vertex(name: str, label: str, *texts: tuple[str, str]) -> dict[str, Any]:
    descriptions = [{"text": text, "label": kind} for text, kind in texts]
    return {"vertex_id": name, "label": label, "descs": descriptions}


def write_gbc(root: Path, name: str) -> None:
    """Tars as img2dataset writes them with ``--save_additional_columns '["vertices"]'``."""
    members = []
    for number in range(COUNT):
        key, about = f"{number:05d}", {"url": "http://x/y.jpg", "status": "success", "error_message": None}
        vertices = [
            vertex("", "image", (f"Long {number}", "detail"), (f"Short {number}", "short")),
            vertex("horse", "entity", ("A brown horse", "detail")),
            vertex("trees", "composition", ("Both are bare", "short")),
            vertex("[horse|snow]", "relation", (f"In snow {number}", "relation")),
        ]
        row = json.dumps({"vertices": vertices, "key": key, **about}, indent=4)
        members += [(f"{key}.jpg", picture(number, 9, 9)), (f"{key}.json", row.encode())]
    write_tar(root / name / "00000.tar", members)


def write_dfn(root: Path) -> None:
    """Tars of img2dataset, and others with held-out pictures."""
    for name, first in (("dfn-2b/00000", 0), ("coco/val2017-00000", COUNT)):
        members = []
        for number in range(first, first + COUNT):
            row = {"uid": f"{number:032x}", "url": "http://x/y.jpg", "caption": "of JSON", "status": "success"}
            texts = {"txt": f"Text {number}".encode(), "json": json.dumps(row).encode()}
            members += [(f"{number:05d}.jpg", picture(number, 9, 9))]
            members += [(f"{number:05d}.{kind}", text) for kind, text in texts.items()]
        write_tar(root / f"{name}.tar", members)


def write_recap(root: Path) -> None:
    """``new_data.parquet`` with an image feature."""
    columns = {
        "image_id": [str(number) for number in range(COUNT)],
        "caption": ["of COCO"] * COUNT,
        "recaption": [f"Recaption {number}" for number in range(COUNT)],
        "coco_url": ["http://images.cocodataset.org/val2014/x.jpg"] * COUNT,
    }
    (root / "recap-coco-30k").mkdir()
    images = [picture(number, 9, 9) for number in range(COUNT)]
    write_huggingface(root / "recap-coco-30k/new_data.parquet", images, columns)


COMPLETE = " Tree: Green leaves. Sky"


def extended(number: int) -> str:
    return f"A pump {number}." + (f" It is old. Very {number}." if number != 1 else "")


#: Each config: what writes its set, and the captions of a picture by its number.
SETS: dict[str, tuple[Callable[[Path], None], Callable[[int], list[str]]]] = {
    "finetune-coco38k": (write_coco, lambda number: [f"caption {n} of {number}" for n in range(2)]),
    "finetune-docci": (write_docci, lambda number: [f"About train_{number:05d}"]),
    "recipes/coca-dci-short": (write_dci, lambda number: [f"A pump {number}."]),
    "recipes/coca-dci-extended": (write_dci, lambda number: [extended(number)]),
    "recipes/coca-dci-complete": (write_dci, lambda number: [extended(number) + COMPLETE]),
    "recipes/coca-recap-coco-30k": (write_recap, lambda number: [f"Recaption {number}"]),
    "recipes/coca-dfn2b": (write_dfn, lambda number: [f"Text {number}"]),
    "recipes/coca-gbc1m-short": (partial(write_gbc, name="gbc1m"), lambda number: [f"Short {number}"]),
    "recipes/coca-gbc1m-long": (partial(write_gbc, name="gbc1m"), lambda number: [f"Long {number}"]),
    "recipes/coca-gbc10m-long": (partial(write_gbc, name="gbc10m"), lambda number: [f"Long {number}"]),
    "recipes/coca-gbc10m-short-relation": (
        partial(write_gbc, name="gbc10m"),
        lambda number: [f"Short {number}", f"In snow {number}"],
    ),
}


def test_every_config_of_a_captioner_is_read_here() -> None:
    found = [*ROOT.glob("configs/finetune-*.yaml"), *ROOT.glob("configs/recipes/coca-*.yaml")]
    names = {str(path.relative_to(ROOT / "configs").with_suffix("")) for path in found}
    assert names - {"finetune-demo"} == {*SETS}


def overrides(name: str, root: Path) -> list[str]:
    """What is set in a config: folders for its buckets."""
    config = settings.load(CaptionerConfig, ROOT / f"configs/{name}.yaml")

    def local(url: str | list[str]) -> str:
        assert isinstance(url, str)
        return url.replace("s3://YOUR-BUCKET", str(root))

    values = {"output": f"{root}/out", "data.source": local(config.data.source)}
    if config.data.images_from:
        values["data.images_from"] = local(*config.data.images_from)
    if config.held_out.source:
        values["held_out.source"] = local(config.held_out.source)
    else:
        values["held_out.share"] = "0.5"
    return [f"{key}={value}" for key, value in values.items()]


@pytest.mark.parametrize("name", SETS)
def test_the_published_layout_gives_the_captions_of_each_picture(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path
    write, captions_of = SETS[name]
    write(root)
    if name.startswith("finetune-"):
        convert(name, root, monkeypatch)
    config = settings.load(CaptionerConfig, ROOT / f"configs/{name}.yaml", overrides(name, root))
    source = PairSource("data", config.data.source, None, config.data, seed=0)
    refused = Counter[str]()
    pairs = [pair for shard, _ in source.groups() for pair in source.pairs(shard, refused)]
    numbers = {picture(number, 9, 9): number for number in range(2 * COUNT)}
    found = [numbers[item.image] for item, _ in pairs if isinstance(item, RawSample)]
    assert [[*captions] for _, captions in pairs] == [captions_of(number) for number in found]
    assert len({*found}) == len(found) == COUNT
    assert not refused


def convert(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what docs/captions.md shows for a set."""
    [block] = [
        block for block in blocks("docs/captions.md", "python") if name.removeprefix("finetune-")[:4] in block.text
    ]
    monkeypatch.chdir(root)
    exec(compile(block.text, "docs/captions.md", "exec"), {})


def test_an_expression_that_is_none_is_refused() -> None:
    wrong = "data.captions=['jmespath:vertices[?']"
    with pytest.raises(UserError, match=r"data\.captions\.0: 'jmespath:vertices\[\?' is no expression of JMESPath"):
        settings.load(CaptionerConfig, ROOT / "configs/recipes/coca-dfn2b.yaml", [wrong])
