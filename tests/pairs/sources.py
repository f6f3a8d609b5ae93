"""The same samples in each format of sources."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from reinforce.source.urls import filesystem
from tests.helpers.data import picture
from tests.helpers.images import encode, noise
from tests.helpers.reinforced import fresh_dataset

#: The most true captions of a sample with several.
SEVERAL = 3
#: Texts of captions: ``long`` ones do not fit the cells of Python's csv reader.
TEXTS = {
    "plain": "thing {} of a shard",
    "odd": 'He said: "{}; a|b",\n\tna\u00efve caf\u00e9 \u4e2d\uff8a <end_of_text> \u00e2\u20ac\u2122 \\ {{}}',
    "long": "thing {} " + "and more " * 15_000,
}
_BROKEN = 2  # the sample of a shard that a damage is of


@dataclass(frozen=True)
class Sample:
    """A sample of a source; ``data`` None is an image that is not there. ``stray`` has a row after it that is none."""

    key: str
    data: bytes | None
    captions: tuple[str, ...]
    stray: bool = False

    @property
    def file(self) -> str:
        return f"{self.key}.jpg" if (self.data or b"").startswith(b"\xff\xd8") else f"{self.key}.png"


Shards = Sequence[Sequence[Sample]]


def make_samples(
    captions: str, text: str, damage: str, sizes: Sequence[int] = (6, 5), repeated: bool = False, version: int = 0
) -> list[list[Sample]]:
    """Samples of shards; keys are ``repeated`` in each. The pictures of the last shard are of a ``version``."""
    shards = []
    for shard, size in enumerate(sizes):
        samples = []
        for number in range(size):
            seed = 1000 * shard + number + (500 * version if shard == len(sizes) - 1 else 0)
            damaged = damage if number == _BROKEN else "none"
            data = {"broken": b"no image", "lost": None}.get(damaged, _image(seed))
            texts = [TEXTS[text].format(f"{seed}-{one}") for one in range(1 + number % SEVERAL)]
            kept = {"several": texts, "partial": texts[: number % 2]}.get(captions, texts[:1])
            key = f"s{0 if repeated else shard}{number:03d}"
            samples.append(Sample(key, data, tuple(kept if captions != "none" else ()), damaged == "stray"))
        shards.append(samples)
    return shards


def _image(seed: int) -> bytes:
    """An image of one of the sorts that the image policy converts."""
    image = noise(18, 14, seed=seed)
    if seed % 4 == 1:  # lies on its side
        exif = Image.Exif()
        exif[0x0112] = 6
        return encode(image, "JPEG", quality=95, exif=exif)
    if seed % 4 == 2:  # half transparent
        image.putalpha(image.convert("L"))
        return encode(image)
    return encode(image.convert("I;16")) if seed % 4 == 3 else picture(seed, 18, 14)


def write(root: str, format_: str, shards: Shards, captions: str) -> tuple[Any, dict[str, Any]]:
    """Write samples under a URL -> the ``source`` and ``input`` of a config that reads them."""
    given: dict[str, Any] = {"captions": "none"} if captions == "none" else {}
    if captions == "several":
        given = {"captions": ["json:text"], "captions_per_sample": SEVERAL}
    source, own = WRITERS[format_](root, shards, captions == "several")
    return source, {**own, **given}


def _put(url: str, content: bytes) -> None:
    fs, path = filesystem(url)
    if "://" not in url:
        Path(url).parent.mkdir(parents=True, exist_ok=True)
    fs.pipe_file(path, content)


def _tar(root: str, shards: Shards, several: bool) -> tuple[str, dict[str, Any]]:
    for number, samples in enumerate(shards):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for one in samples:
                stated = {"uid": one.key, **({"text": [*one.captions]} if several else {})}
                members = {f"{one.key}.json": json.dumps(stated).encode()}
                if one.data is not None:
                    members[one.file] = one.data
                if one.captions and not several:
                    members[f"{one.key}.txt"] = one.captions[0].encode()
                for name, data in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        _put(f"{root}/source/{number}.tar", buffer.getvalue())
    return f"{root}/source/*.tar", {}


def _table(root: str, shards: Shards, ending: str, contents: Sequence[str]) -> str:
    """Write a table for each shard, beside a folder with its images -> the glob of the tables."""
    for number, (samples, content) in enumerate(zip(shards, contents, strict=True)):
        _put(f"{root}/source/{number}.{ending}", content.encode())
        _images(f"{root}/source/{number}", samples)
    return f"{root}/source/*.{ending}"


def _rows(samples: Sequence[Sample], several: bool) -> list[tuple[Sample | None, str | None]]:
    """A row for each caption of each sample, those of a sample one after another; None is a row that is none."""
    rows: list[tuple[Sample | None, str | None]] = []
    for one in samples:
        own: list[tuple[Sample | None, str | None]] = [(one, text) for text in one.captions or (None,)]
        rows += [*own[:1], *([(None, None)] if one.stray else []), *own[1:]]
    return rows


def _images(folder: str, samples: Sequence[Sample]) -> None:
    for one in samples:
        if one.data is not None:
            _put(f"{folder}/{one.file}", one.data)
        elif "://" not in folder:
            Path(folder, one.file).symlink_to(one.file)  # to itself


def _parquet(root: str, shards: Shards, several: bool) -> tuple[str, dict[str, Any]]:
    for number, samples in enumerate(shards):
        rows = _rows(samples, several)
        columns = {
            "key": [one and one.key for one, _ in rows],
            "image": pa.array([one and one.data for one, _ in rows], pa.binary()),
            "text": pa.array([text for _, text in rows], pa.string()),
        }
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns), buffer)
        _put(f"{root}/source/{number}.parquet", buffer.getvalue())
    return f"{root}/source/*.parquet", {}


def _jsonl(root: str, shards: Shards, several: bool) -> tuple[str, dict[str, Any]]:
    contents = []
    for number, samples in enumerate(shards):
        rows = [
            json.dumps(
                {
                    "key": one.key,
                    "file_name": f"{number}/{one.file}",
                    **({"text": text} if text is not None else {}),
                }
            )
            if one
            else '{"key": '
            for one, text in _rows(samples, several)
        ]
        contents.append("\n".join(rows))
    return _table(root, shards, "jsonl", contents), {}


def _csv(root: str, shards: Shards, several: bool) -> tuple[str, dict[str, Any]]:
    contents = []
    for number, samples in enumerate(shards):
        buffer = io.StringIO()
        writer = csv.writer(buffer)
        writer.writerow(["key", "file_name", "text"])
        for one, text in _rows(samples, several):
            writer.writerow([one.key, f"{number}/{one.file}", text] if one else ["a", "b", "c", "d"])
        contents.append(buffer.getvalue())
    return _table(root, shards, "csv", contents), {}


def _coco(root: str, shards: Shards, several: bool) -> tuple[str, dict[str, Any]]:
    contents = []
    for number, samples in enumerate(shards):
        images: list[Any] = []
        for one in samples:
            own = {"id": one.key, "file_name": f"{number}/{one.file}"}
            images += [own, *([{"id": "none"}] if one.stray else [])]
        texts = [{"image_id": one.key, "caption": text} for one in samples for text in one.captions]
        contents.append(json.dumps({"images": images, "annotations": texts}))
    return _table(root, shards, "json", contents), {"format": "coco"}


def _folder(root: str, shards: Shards, several: bool) -> tuple[str, dict[str, Any]]:
    for number, samples in enumerate(shards):
        folder = f"{root}/source/{number}"
        if several:
            rows = [{"file_name": one.file, "text": text} for one in samples for text in one.captions]
            _put(f"{folder}/metadata.jsonl", "\n".join(map(json.dumps, rows)).encode())
        else:
            for one in samples:
                if one.captions:
                    _put(f"{folder}/{one.key}.txt", one.captions[0].encode())
        Path(folder).mkdir(parents=True, exist_ok=True) if "://" not in folder else None
        _images(folder, samples)
    return f"{root}/source", {"format": "folder"}


def _dataset(root: str, shards: Shards, several: bool) -> tuple[str, dict[str, Any]]:
    """A reinforced dataset of tars; what these have of damaged samples is not in it."""
    source, _ = _tar(f"{root}/former", shards, several)
    spec = {"captions": ["json:text"], "captions_per_sample": SEVERAL} if several else {}
    fresh_dataset({"source": source, "output": f"{root}/source", "input": spec, "failures": {"allowed_share": 1.0}})
    return f"{root}/source", {}


#: What writes the samples of each format -> ``source``, and further keys of ``input``.
WRITERS: dict[str, Callable[[str, Shards, bool], tuple[str, dict[str, Any]]]] = {
    "tar": _tar, "parquet": _parquet, "jsonl": _jsonl, "csv": _csv, "coco": _coco, "folder": _folder,
    "dataset": _dataset,
}  # fmt: skip
