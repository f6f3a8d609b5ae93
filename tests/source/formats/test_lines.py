"""Files with a row on each line, plain and compressed: jsonl as RayGen writes it, csv of many programs, and damage."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from reinforce.config import parse_config
from reinforce.engine.plan.source_shards import SourceShards, source_shards
from reinforce.source.config import Input, Limits
from reinforce.source.formats.base import Shard, find_format, read_samples
from reinforce.source.parquet_file import RefusedFile
from reinforce.source.samples import RawSample
from tests.helpers.data import picture
from tests.helpers.tables import outcomes, read_table, write_columns

IMAGES = [picture(number) for number in range(3)]


def raygen(number: int) -> bytes:
    """A line as RayGen writes it: uid, text and url, the image as base64."""
    image = base64.b64encode(IMAGES[number]).decode()
    return json.dumps({"uid": f"u{number}", "text": f"thing {number}", "url": "http://x", "image": image}).encode()


LINES = b"\n".join(map(raygen, range(3))) + b"\n"


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("x.jsonl", bytes),
        ("x.jsonlines", bytes),
        ("x.jsonl.gz", gzip.compress),
        ("x.ndjson.zst", lambda data: pa.compress(data, "zstd", asbytes=True)),
    ],
)
def test_files_of_raygen_are_read_plain_and_compressed(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes]
) -> None:
    (tmp_path / name).write_bytes(pack(LINES))
    found = read_table(tmp_path / name, "jsonl")
    assert outcomes(found) == {f"u{number}": f"thing {number}" for number in range(3)}
    assert [item.image for item in found if isinstance(item, RawSample)] == IMAGES
    assert json.loads(found[0].sidecars["json"]) == {"uid": "u0", "text": "thing 0", "url": "http://x"}  # type: ignore[union-attr]


def test_broken_lines_cost_their_rows(tmp_path: Path) -> None:
    limits = Limits(image_bytes=4000, sidecar_bytes=1000)
    lines = [raygen(0), b"", b"{broken", b"[1]", b'{"text": "no image"}', b"x" * 80_000, raygen(0), raygen(1)]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    assert outcomes(read_table(tmp_path / "x.jsonl", "jsonl", limits=limits)) == {
        "u0": "duplicate_key: the key occurs earlier in this shard; the first is kept",
        "shard-00000001": "row_broken: invalid JSON, null, or nested too deeply: jsonl has one object on each line",
        "shard-00000002": "row_broken: not a JSON object but [1]: jsonl has one object on each line",
        "shard-00000003": "no_image: no column has images: it has text; name one in input.image",
        "shard-00000004": "image_bytes: a line of more than 74,869 bytes",
        "u1": "thing 1",
    }


def test_rows_may_have_different_columns_and_damage_ends_a_file_after_the_rows_before_it(tmp_path: Path) -> None:
    image = base64.b64encode(IMAGES[0]).decode()
    rows = [{"jpg": image, "caption": "a"}, {"image": image}, {"caption": "c", "jpg": image, "key": 3}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = outcomes(read_table(tmp_path / "x.jsonl", "jsonl"))
    assert found == {"shard-00000000": "a", "shard-00000001": "None", "3": "c"}
    packed = gzip.compress(LINES * 40, compresslevel=0)
    (tmp_path / "x.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    *before, last = read_table(tmp_path / "x.jsonl.gz", "jsonl")
    assert {row.key for row in before} == {"u0", "u1", "u2"}
    assert (last.key, last.reason.value) == (None, "shard_damaged")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_jsonl_in_utf_16_or_utf_32_is_named_as_that_in_each_row(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(LINES.decode().encode(encoding))
    *rows, last = read_table(tmp_path / "x.jsonl", "jsonl")
    text = "UTF-16 or UTF-32, in which jsonl is not read: store the file as UTF-8"
    assert {*outcomes(rows).values()} == {f"row_broken: {text}"}
    assert outcomes([last]) == {None: f"shard_unreadable: no line is a JSON object with an image; {text}"}


def test_a_file_without_any_row_is_refused_as_a_whole(tmp_path: Path) -> None:
    for content, detail in (
        (b"\x1f\x8b\x08junk", "compressed data; name the file .gz"),
        (b'[{"image": 1},\n {"image": 2}]', "no line is a JSON object with an image; invalid JSON"),
        (b'{"title": "a"}\n', "no line is a JSON object with an image; no column has images: it has title"),
    ):
        (tmp_path / "x.jsonl").write_bytes(content)
        last = read_table(tmp_path / "x.jsonl", "jsonl")[-1]
        assert (last.key, last.reason.value) == (None, "shard_unreadable")
        assert last.detail.startswith(detail)


def test_csv_and_tsv_are_read_with_quotes_and_compression(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    (tmp_path / "x.csv").write_bytes('\ufefffile_name,text\r\na.png,"one, ""two""\nthree"\r\na.png\r\n'.encode())
    (tmp_path / "x.tsv.gz").write_bytes(gzip.compress(b"file_name\ttext\tkey\na.png\tone, two\tk\n"))
    found = read_table(tmp_path / "x.csv", "csv")
    assert outcomes(found) == {"shard-00000000": 'one, "two" three', "shard-00000001": "None"}
    assert outcomes(read_table(tmp_path / "x.tsv.gz", "csv")) == {"k": "one, two"}
    (tmp_path / "x.csv").write_text(f"file_name,text\na.png,one\n{'a' * 2**20}b,two\na.png,three\n")
    assert list(outcomes(read_table(tmp_path / "x.csv", "csv")).values()) == [
        "one", "image_bytes: line 3: a row of more than 1,048,576 bytes", "three",
    ]  # fmt: skip
    (tmp_path / "x.csv").write_text("file_name,text\na.png,one, two\na.png,three,,\n")
    assert list(outcomes(read_table(tmp_path / "x.csv", "csv")).values()) == [
        "row_broken: line 2: 3 values for 2 columns: quote texts with the delimiter", "three",
    ]  # fmt: skip
    (tmp_path / "x.csv").write_text("a\na\nb\n")
    assert len(read_table(tmp_path / "x.csv", "csv", image="a")) == 2, "lines of one character that are equal"
    (tmp_path / "x.csv").write_text('file_name,text\na.png,"cut off\n')
    [broken, whole] = read_table(tmp_path / "x.csv", "csv")
    assert (broken.key, broken.reason.value) == ("shard-00000000", "row_broken")  # type: ignore[union-attr]
    assert whole.detail.startswith("no line is a row with an image; line 2: unexpected end of data")  # type: ignore[union-attr]


INSIDE = "a text\na.png,invented\n"  # of a cell in quotes


@pytest.mark.parametrize(
    ("name", "row", "refused"),
    [
        ("x.csv", f'a.png,"{INSIDE}{"x " * 70_000}"', None),
        ("x.csv", f'a.png,"{INSIDE}{"x" * 2**20}""quoted"" {INSIDE}"', "a row of more than 1,048,576 bytes"),
        ("x.csv", f'a.png,"{INSIDE * 60_000}"', "a row of more than 1,048,576 bytes"),
        ("x.csv", f'a.png, "{"x" * 2**20}\n{INSIDE}"', "a row of more than 1,048,576 bytes"),
        ("x.csv", f'a.png,"{"x" * 2**20}" and more', "a row of more than 1,048,576 bytes"),
        ("x.tsv", f'a.png\t5" and {"x" * 2**20}', "a row of more than 1,048,576 bytes"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_long_cell_of_csv_with_lines_in_it_costs_its_row_at_most_and_later_rows_keep_their_keys(
    tmp_path: Path, name: str, row: str, refused: str | None, encoding: str
) -> None:
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    delimiter = "\t" if name == "x.tsv" else ", " if ", " in row[:8] else ","
    rows = [delimiter.join(cells) for cells in (("file_name", "text"), ("a.png", "one"), ("a.png", "three"))]
    (tmp_path / name).write_text("\n".join([rows[0], rows[1], row, rows[2], ""]), encoding)
    first, long, last = read_table(tmp_path / name, "csv")
    assert outcomes([first, last]) == {"shard-00000000": "one", "shard-00000002": "three"}
    if refused:
        assert outcomes([long]) == {"shard-00000001": f"image_bytes: line 3: {refused}"}
    else:
        assert long.sidecars["txt"].decode() == f"{INSIDE}{'x ' * 70_000}"  # type: ignore[union-attr]
    parts = [*find_format("csv").parts(str(tmp_path / name), 1)]
    assert [part.first for part in parts] == [0, 1, 2]
    assert [*read_samples(Shard("x/<part>", "shard", "csv", part=parts[2]), Input())] == [last]


def test_a_quote_of_csv_without_an_end_is_named_where_it_swallows_the_rest_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    (tmp_path / "x.csv").write_text(f'file_name,text\na.png,one\na.png,"two\n{INSIDE * 60_000}')
    assert list(outcomes(read_table(tmp_path / "x.csv", "csv")).values()) == [
        "one", "image_bytes: line 3: a row of 1,320,011 bytes: one of its quotes has no end",
    ]  # fmt: skip


EXCEL = 'file_name,text\r\na.png,"schön, süß"\r\na.png,“zwei” – drei\r\n'
LATIN = 'file_name,text\na.png,"schön, süß"\na.png,Mädchen\n'


@pytest.mark.parametrize(
    ("texts", "encoding"),
    [
        (["a naïve café", "straße über", "a dog", "piñata"], "cp1252"),
        (["une élève à l'école", "garçon déçu"], "cp1252"),
        (["zażółć gęślą jaźń", "chłopiec w śniegu"], "cp1250"),
        (["Příliš žluťoučký kůň úpěl ďábelské ódy"], "cp1250"),
        (["кошка сидит на окне"], "cp1251"),
        (["собака бежит по траве"], "cp1251"),
        (["Чёрная кошка и белая собака"], "cp1251"),
        (["γάτα στο παράθυρο", "σκύλος στο γρασίδι"], "cp1253"),
    ],
)
def test_a_table_in_an_encoding_of_windows_is_read_by_its_letters(
    tmp_path: Path, texts: list[str], encoding: str
) -> None:
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    lines = ["file_name;text", *(f"a.png;{text}" for text in texts)]
    (tmp_path / "x.csv").write_bytes("\n".join(lines).encode(encoding))
    assert list(outcomes(read_table(tmp_path / "x.csv", "csv")).values()) == texts


@pytest.mark.parametrize(
    ("name", "content", "second"),
    [
        ("x.csv", EXCEL.encode(), "“zwei” – drei"),
        ("x.csv", EXCEL.encode("utf-8-sig"), "“zwei” – drei"),
        ("x.csv", EXCEL.encode("utf-16"), "“zwei” – drei"),
        ("x.csv.gz", gzip.compress(b"\xfe\xff" + EXCEL.encode("utf-16-be")), "“zwei” – drei"),
        ("x.csv", EXCEL.encode("utf-16-be"), "“zwei” – drei"),
        ("x.csv", LATIN.encode("latin-1"), "Mädchen"),
        ("x.csv", EXCEL.encode("cp1252"), "“zwei” – drei"),
        ("x.csv", 'file_name;text\na.png;schön, süß\na.png;"drei; vier"\n'.encode(), "drei; vier"),
        ("x.csv", "file_name\ttext\r\na.png\tschön, süß\r\na.png\tdrei\r\n".encode("utf-16"), "drei"),
        ("x.tsv", "file_name;text\na.png;schön, süß\na.png;drei\n".encode(), "drei"),
        ("x.csv", 'image_name, text\na.png, "schön, süß"\na.png, drei\n'.encode(), "drei"),
        ("x.csv", "image_name| number| text\na.png| 0| schön, süß\na.png| 1| drei\n".encode(), "drei"),  # Flickr30k
        ("x.csv", "bild;text\na.png;schön, süß\na.png;drei\n".encode(), "drei"),
    ],
)
def test_csv_is_read_in_the_encoding_and_with_the_delimiter_that_the_file_shows(
    tmp_path: Path, name: str, content: bytes, second: str
) -> None:
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    (tmp_path / name).write_bytes(content)
    spec = {"image": "bild"} if b"bild" in content else {}
    whole = read_table(tmp_path / name, "csv", **spec)
    assert list(outcomes(whole).values()) == ["schön, süß", second]
    parts = [*find_format("csv").parts(str(tmp_path / name), 1)]
    shards = [Shard("x/<part>", "shard", "csv", part=part) for part in parts]
    assert [item for shard in shards for item in read_samples(shard, Input(**spec))] == whole


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("x.csv", b"a.png,A dog\na.png,two\n", "the first line has 'a.png', so it is a sample"),
        ("x.csv", b"A dog;http://example.org/1\n", "the first line has 'http://example.org/1', so it is a sample"),
        ("x.txt", b"a.png#0\tA dog\na.png#1\ttwo\n", "the first line has 'a.png#0', so it is a sample"),
        ("x.csv", b"file_name,text,text\na.png,one,two\n", "2 columns have the name 'text'"),
    ],
)
def test_a_first_line_that_cannot_be_the_names_of_columns_refuses_the_file(
    tmp_path: Path, name: str, content: bytes, fault: str
) -> None:
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    (tmp_path / name).write_bytes(content)
    *_, last = read_table(tmp_path / name, "csv", image="a.png" if name == "x.csv" else None)
    assert (last.key, last.reason.value) == (None, "shard_unreadable")
    assert fault in last.detail
    with pytest.raises(RefusedFile, match="line 1: "):
        find_format("csv").first_row(str(tmp_path / name))


def test_the_path_or_url_of_an_image_is_kept_in_the_metadata_and_its_bytes_are_not(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    (tmp_path / "x.csv").write_text("path,text\na.png,one\n")
    encoded = base64.b64encode(IMAGES[1]).decode()
    rows = [{"image": "a.png", "text": "one"}, {"image": encoded, "text": "two"}]
    (tmp_path / "x.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    write_columns(tmp_path / "x.parquet", {"url": ["a.png"], "text": ["one"]})

    def metadata(name: str, **spec: object) -> list[object]:
        items = read_table(tmp_path / name, name.partition(".")[2], **spec)
        return [json.loads(item.sidecars.get("json", b"null")) for item in items]  # type: ignore[union-attr]

    assert metadata("x.csv") == [{"path": "a.png", "text": "one"}]
    assert metadata("x.csv", metadata=["path"]) == [{"path": "a.png"}]
    assert metadata("x.csv", metadata="none") == metadata("x.csv", metadata=["absent"]) == [None]
    assert metadata("x.jsonl") == [{"image": "a.png", "text": "one"}, {"text": "two"}]
    assert metadata("x.parquet") == [{"url": "a.png", "text": "one"}]


def test_a_text_file_of_names_and_captions_is_a_table_and_a_guessed_encoding_is_noted(
    tmp_path: Path,
) -> None:
    (tmp_path / "captions.txt").write_text("image,caption\na.png,A child in a pink dress .\n")
    (tmp_path / "list.txt").write_text("x/{a,b}.csv\ns3://bucket/image,text.csv\n")

    def shards(name: str) -> SourceShards:
        return source_shards(parse_config({"source": f"{tmp_path}/{name}", "output": f"{tmp_path}/out"}))

    assert (shards("captions.txt").urls, shards("captions.txt").format.name) == ([f"{tmp_path}/captions.txt"], "csv")
    urls = [f"{tmp_path}/x/a.csv", f"{tmp_path}/x/b.csv", "s3://bucket/image,text.csv"]
    assert (shards("list.txt").urls, shards("list.txt").format.name) == (urls, "csv")
    path = tmp_path / "x.csv"
    for content, note in ((LATIN.encode(), ""), (LATIN.encode("utf-16"), ""), (LATIN.encode("latin-1"), "as cp1252")):
        path.write_bytes(content)
        assert note in "".join(notes := find_format("csv").notes(str(path)))
        assert len(notes) == bool(note)
    path.write_bytes(LATIN.encode() + b"a.png,\x81\x8d\xff\n")
    assert "characters in its first" in find_format("csv").notes(str(path))[-1]
