"""jsonl: a JSON object on each line, plain or compressed. Empty lines are skipped."""

from __future__ import annotations

from collections.abc import Iterator

from reinforce.source.captions import json_error, parse_json
from reinforce.source.formats.base import Part
from reinforce.source.formats.lines import COMPRESSIONS, BrokenRow, LinesFormat, Row, file_lines, too_long

_ENDS_LINE_BYTES = 2**12  # of a line that only has to be found


class Jsonl(LinesFormat):
    name = "jsonl"
    noun = "jsonl file"
    line = "a JSON object"
    endings = tuple(
        f".{name}{end}" for name in ("jsonl", "ndjson", "jsonlines") for end in ("", *(f".{e}" for e in COMPRESSIONS))
    )
    other_endings = (".json", *(f".json.{end}" for end in COMPRESSIONS))  # such as Dataset.to_json writes
    whole_bytes = 2**31

    def recognises(self, head: bytes) -> bool:
        return head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")

    def rows(self, url: str, most: int, part: Part | None = None) -> Iterator[tuple[int, Row | BrokenRow]]:
        number = part.first if part else 0
        for line, _ in file_lines(url, most, part):
            if line is None:
                yield number, too_long(most)
            elif 0 in line[:4]:  # JSON has no such byte, and its text begins with characters of ASCII
                yield number, BrokenRow("UTF-16 or UTF-32, in which jsonl is not read: store the file as UTF-8")
            elif line.strip():
                document = parse_json(line)
                if isinstance(document, dict):
                    yield number, document
                else:
                    yield number, BrokenRow(f"{json_error(line)}: jsonl has one object on each line")
            else:
                continue
            number += 1

    def ends(self, url: str) -> Iterator[int]:
        # Lines are only counted, so long ones are not held in memory.
        position = 0
        for line, size in file_lines(url, _ENDS_LINE_BYTES):
            position += size
            if line is None or line.strip():
                yield position


FORMAT = Jsonl()
