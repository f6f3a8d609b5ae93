"""HEIC, as telephones write it: decoded by pillow-heif, and named with its extra where that is missing."""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reinforce.dataset.reading import Dataset
from reinforce.errors import UserError
from reinforce.images.policy import ImageRefused, decode, format_extension
from reinforce.processes.imports import installed, reads_heic
from reinforce.source.config import Input, Limits
from reinforce.source.formats.base import Shard, read_samples
from tests.helpers.commands import run_command
from tests.helpers.data import config_of, picture, write_tar
from tests.helpers.images import encode
from tests.helpers.reinforced import reinforce_here
from tests.helpers.tables import write_columns

LIMITS = Limits()
#: The beginning of a HEIC, without images.
HEAD = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
EXTRA = r"HEIC needs pillow-heif: run pip install -e '\.\[heic\]'"
with_decoder = pytest.mark.skipif(not installed("pillow_heif"), reason="the extra `heic` is not installed")


@pytest.fixture
def without_decoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    reads_heic.cache_clear()
    yield
    reads_heic.cache_clear()


def heic(image: Image.Image, **options: object) -> bytes:
    """An image in HEIC."""
    import pillow_heif

    pillow_heif.register_heif_opener()
    return encode(image, "HEIF", **options)


def blocks(mode: str = "RGB") -> Image.Image:
    """An image of 80 x 60 pixels with blocks of colours, which are not lost by HEVC."""
    colours = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(np.kron(colours, np.ones((20, 20, 1), np.uint8))).convert(mode)


def difference(image: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(image, int) - np.asarray(other, int)).mean())


@pytest.mark.usefixtures("without_decoder")
def test_without_the_extra_it_is_refused_and_every_command_names_the_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ImageRefused, match=f"image_format: {EXTRA}"):
        decode(HEAD, LIMITS)
    photos, shard = tmp_path / "photos", write_tar(tmp_path / "a.tar", [("a.HEIC", HEAD), ("a.txt", b"a text")])
    photos.mkdir()
    (photos / "a.HEIC").write_bytes(HEAD)
    [refused] = read_samples(Shard(str(shard), "a", "tar"), Input())
    assert EXTRA.replace("\\", "") in str(refused)
    table = write_columns(tmp_path / "rows.parquet", {"image": [HEAD], "text": ["a text"]})
    for source in (photos, shard, table):
        with pytest.raises(UserError, match=EXTRA):
            reinforce_plan(source, tmp_path)
        status, out, err = run_command(capsys, "init", str(source), str(tmp_path / "my.yaml"), "--force")
        assert (status, EXTRA.replace("\\", "") in out + err) == (0 if source == table else 2, True)
    images = {"a.png": picture(1), "b.HEIC": HEAD}
    write_tar(shard, sorted([*images.items(), ("a.txt", b"a text"), ("b.txt", b"a text")]))
    write_columns(table, {"image": [*images.values()], "text": ["a text", "a text"]})
    for source in (shard, table):
        notes = "\n".join(reinforce_plan(source, tmp_path))
        assert len(re.findall(f": images of the first samples are HEIC, and quarantined. {EXTRA}", notes)) == 1
    (photos / "b.png").write_bytes(picture(1))
    _, out, _ = run_command(capsys, "init", str(photos), str(tmp_path / "my.yaml"), "--force")
    assert f"source: 1 other file not read, such as {photos}/a.HEIC; HEIC needs pillow-heif" in out


def reinforce_plan(source: Path, folder: Path) -> list[str]:
    from reinforce.config import parse_config
    from reinforce.engine.plan.plan import make_plan
    from reinforce.engine.preflight.check_source import check_source

    return check_source(make_plan(parse_config(config_of(str(source), folder / "out"))))[1]


@with_decoder
def test_a_run_decodes_it_like_other_images_and_an_earlier_list_gets_what_it_left_out(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        (photos / f"{number}.HEIC").write_bytes(heic(blocks()))
    (photos / "3.png").write_bytes(picture(1))
    config = config_of(str(photos), tmp_path / "out", captioners={}, input={"captions": []})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)
        reads_heic.cache_clear()
        assert len(Dataset(reinforce_here(config))) == 1
    reads_heic.cache_clear()
    samples = {sample.key: sample for sample in Dataset(reinforce_here(config))}
    assert samples.keys() == {"0", "1", "2", "3"}
    assert difference(decode(samples["1"].image, LIMITS), blocks()) < 4
    assert samples["1"].augmented(0).size == (24, 24)


@with_decoder
def test_it_is_decoded_with_the_orientation_of_its_container_over_white() -> None:
    data = heic(blocks(), quality=90)
    assert difference(decode(data, LIMITS, strict=True), blocks()) < 4
    assert format_extension(data) == "heic"
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode(heic(blocks(), quality=90, exif=exif.tobytes()), LIMITS)  # pillow-heif writes a rotation of it
    assert difference(turned, blocks().transpose(Image.Transpose.ROTATE_270)) < 4
    clear = blocks("RGBA")
    clear.putalpha(0)
    assert np.asarray(decode(heic(clear), LIMITS)).min() == 255
    assert decode(heic(blocks("L")), LIMITS).mode == "RGB"


@with_decoder
def test_what_is_cut_off_ends_in_zeros_or_states_another_size_is_refused() -> None:
    data = heic(blocks())
    for length in range(len(data)):
        with pytest.raises(ImageRefused):
            decode(data[:length], LIMITS, strict=True)
    whole = heic(blocks().resize((640, 480)), quality=95)
    with pytest.raises(ImageRefused, match="ends in 1,024 zeros"):
        decode(whole[:-2000] + bytes(2000), LIMITS, strict=True)
    at = whole.index(b"ispe") + 8
    for size, reason in (
        ((8, 8), "broken"),
        ((30_000, 30_000), "pixels"),
        ((641, 480), "broken"),
        ((2000, 20), "aspect"),
    ):
        with pytest.raises(ImageRefused, match=f"image_{reason}"):
            decode(whole[:at] + struct.pack(">II", *size) + whole[at + 8 :], LIMITS)


@with_decoder
def test_random_damage_is_decoded_or_refused_and_nothing_else() -> None:
    rng, data = np.random.default_rng(1), heic(blocks())
    refused = 0
    for _ in range(400):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), 4):
            damaged[at] = rng.integers(256)
        try:
            assert decode(bytes(damaged), LIMITS, strict=True).mode == "RGB"
        except ImageRefused:
            refused += 1
    assert 0 < refused < 400
