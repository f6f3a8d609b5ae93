"""Captions and json sidecars with the defects of web data, and what a run makes of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

SIDECAR_BYTES = 200_000  # limits.sidecar_bytes of the run
MEMBERS = 8  # limits.members of the run


@dataclass(frozen=True)
class TextCase:
    """Members beside a good image; all are rows. ``notes`` are the reasons in quarantine/samples."""

    defect: str
    members: Callable[[], list[tuple[str, bytes]]]
    caption: str | None
    metadata: str | None = None
    notes: tuple[str, ...] = ()
    note: str = ""

    @property
    def what(self) -> str:
        said = [f"`{note}`" for note in self.notes] + (["`no_text` in the layers of texts"] if not self.caption else [])
        return "kept: " + "; ".join([*([self.note] if self.note else []), *said])


def txt(data: bytes) -> Callable[[], list[tuple[str, bytes]]]:
    return lambda: [("txt", data)]


def json(data: bytes) -> Callable[[], list[tuple[str, bytes]]]:
    return lambda: [("txt", b"a cat"), ("json", data)]


DEEP = b'{"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"

TEXTS = [
    TextCase("no caption", list, None),
    TextCase("empty caption", txt(b""), None),
    TextCase("caption of blanks", txt(b" \n\t\r\n "), None),
    TextCase("caption in json alone", lambda: [("json", b'{"caption": "a cat"}')], "a cat", '{"caption":"a cat"}',
             note="read by `input.captions`"),
    TextCase("caption of 100,000 letters", txt(b"a" * 100_000), "a" * 2_000,
             note="cut at `limits.caption_chars`, before any tokenizer sees it"),
    TextCase("caption above limits.sidecar_bytes", txt(b"a" * (SIDECAR_BYTES + 1)), None, notes=("sidecar_bytes",)),
    TextCase("NUL bytes", txt(b"a\0cat\0"), "a cat", note="blanks instead"),
    TextCase("control characters of terminals", txt(b"\x1b[31ma cat\x9b"), "[31ma cat\ufffd", note="blanks instead"),
    TextCase("invalid UTF-8", txt(b"K\xe4se"), "K\ufffdse", note="U+FFFD instead"),
    TextCase("UTF-16 with its mark", txt("Käse".encode("utf-16")), "Käse", note="understood"),
    TextCase("right-to-left text", txt("\u202eقطة".encode()), "\u202eقطة", note="as it is"),
    TextCase("markup of rich", txt(b"[bold]a cat[/]"), "[bold]a cat[/]", note="as it is"),
    TextCase("<end_of_text> in a caption", txt(b"a <end_of_text> cat"), "a <end_of_text> cat",
             note="stored as it is; tokenized as plain characters"),
    TextCase("several captions", lambda: [("txt", b"one"), ("json", b'{"caption": "two"}')], "one",
             '{"caption":"two"}', note="the first of `input.captions`"),
    TextCase("invalid json", json(b'{"a": '), "a cat", notes=("sidecar_broken",), note="without metadata"),
    TextCase("json null", json(b"null"), "a cat", notes=("sidecar_broken",), note="without metadata"),
    TextCase("json that is a list", json(b'["a"]'), "a cat", notes=("sidecar_broken",), note="without metadata"),
    TextCase("json nested 50,000 deep", json(DEEP), "a cat", notes=("sidecar_broken",), note="without metadata"),
    TextCase("json with a number of 5,000 digits", json(b'{"a": ' + b"1" * 5_000 + b"}"), "a cat",
             notes=("sidecar_broken",), note="without metadata"),
    TextCase("json above limits.sidecar_bytes", json(b" " * SIDECAR_BYTES + b"{}"), "a cat",
             notes=("sidecar_bytes",), note="without metadata"),
    TextCase("json with lone surrogates", json(rb'{"a": "\ud83d \ud83d\ude00"}'), "a cat",
             '{"a":"\ufffd 😀"}', note="U+FFFD instead"),
    TextCase("json of mixed types", json(b'{"a": 1, "b": [true, null, "x"], "c": {"d": 2.5}}'), "a cat",
             '{"a":1,"b":[true,null,"x"],"c":{"d":2.5}}', note="as it is"),
    TextCase("json with 2^70", json(b'{"a": 1180591620717411303424}'), "a cat", '{"a":1180591620717411303424}',
             note="as it is"),
    TextCase("json with NaN and 1e999", json(b'{"a": NaN, "b": 1e999}'), "a cat", '{"a":null,"b":null}',
             note="null instead"),
    TextCase("caption in json that is a number", lambda: [("json", b'{"caption": 5}')], None, '{"caption":5}'),
    TextCase("more than limits.members members", lambda: [("txt", b"a cat"), *((f"{i}.npy", b"x") for i in range(20))],
             "a cat", notes=("members",), note="the first ones are read"),
    TextCase("a member twice", lambda: [("txt", b"one"), ("txt", b"two")], "one", notes=("duplicate_key",),
             note="the first"),
]  # fmt: skip
