"""Captions and json sidecars with the defects of web data, and the expected outcome of a run for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

SIDECAR_BYTES = 200_000  # limits.sidecar_bytes of the run
MEMBERS = 8  # limits.members of the run


@dataclass(frozen=True)
class TextCase:
    """Members next to a good image, which always becomes a row. ``reasons`` are those in quarantine/samples."""

    defect: str
    members: Callable[[], list[tuple[str, bytes]]]
    caption: str | None
    metadata: str | None = None
    reasons: tuple[str, ...] = ()
    note: str = ""

    @property
    def outcome(self) -> str:
        reasons = [f"`{reason}`" for reason in self.reasons]
        reasons += [] if self.caption else ["`no_text` in the layers of texts"]
        return "kept: " + "; ".join([*([self.note] if self.note else []), *reasons])


def txt(data: bytes) -> Callable[[], list[tuple[str, bytes]]]:
    return lambda: [("txt", data)]


def json(data: bytes) -> Callable[[], list[tuple[str, bytes]]]:
    return lambda: [("txt", b"a cat"), ("json", data)]


DEEP = b'{"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"

TEXTS = [
    TextCase("no caption", list, None),
    TextCase("empty caption", txt(b""), None, reasons=("no_text",)),
    TextCase("caption of whitespace", txt(b" \n\t\r\n "), None, reasons=("no_text",)),
    TextCase("caption only in json", lambda: [("json", b'{"caption": "a cat"}')], "a cat", '{"caption":"a cat"}',
             note="read by `input.captions`"),
    TextCase("caption of 100,000 characters", txt(b"a" * 100_000), "a" * 2_000,
             note="cut at `limits.caption_chars`, before tokenization"),
    TextCase("caption above limits.sidecar_bytes", txt(b"a" * (SIDECAR_BYTES + 1)), None,
             reasons=("sidecar_bytes", "no_text")),
    TextCase("NUL bytes", txt(b"a\0cat\0"), "a cat", note="replaced by spaces"),
    TextCase("terminal control characters", txt(b"\x1b[31ma cat\x9b"), "[31ma cat\ufffd", note="replaced by spaces"),
    TextCase("invalid UTF-8", txt(b"K\xe4se"), "K\ufffdse", note="replaced by U+FFFD"),
    TextCase("UTF-16 with a byte order mark", txt("Käse".encode("utf-16")), "Käse", note="decoded"),
    TextCase("right-to-left text", txt("\u202eقطة".encode()), "\u202eقطة", note="stored unchanged"),
    TextCase("markup of rich", txt(b"[bold]a cat[/]"), "[bold]a cat[/]", note="stored unchanged"),
    TextCase("<end_of_text> in a caption", txt(b"a <end_of_text> cat"), "a <end_of_text> cat",
             note="stored unchanged; tokenized as plain characters"),
    TextCase("several captions", lambda: [("txt", b"one"), ("json", b'{"caption": "two"}')], "one",
             '{"caption":"two"}', note="the first of `input.captions`"),
    TextCase("invalid json", json(b'{"a": '), "a cat", reasons=("sidecar_broken",), note="without metadata"),
    TextCase("json null", json(b"null"), "a cat", reasons=("sidecar_broken",), note="without metadata"),
    TextCase("json that is a list", json(b'["a"]'), "a cat", reasons=("sidecar_broken",), note="without metadata"),
    TextCase("json nested 50,000 deep", json(DEEP), "a cat", reasons=("sidecar_broken",), note="without metadata"),
    TextCase("json with a number of 5,000 digits", json(b'{"a": ' + b"1" * 5_000 + b"}"), "a cat",
             reasons=("sidecar_broken",), note="without metadata"),
    TextCase("json above limits.sidecar_bytes", json(b" " * SIDECAR_BYTES + b"{}"), "a cat",
             reasons=("sidecar_bytes",), note="without metadata"),
    TextCase("json with lone surrogates", json(rb'{"a": "\ud83d \ud83d\ude00"}'), "a cat",
             '{"a":"\ufffd 😀"}', note="replaced by U+FFFD"),
    TextCase("json of mixed types", json(b'{"a": 1, "b": [true, null, "x"], "c": {"d": 2.5}}'), "a cat",
             '{"a":1,"b":[true,null,"x"],"c":{"d":2.5}}', note="stored unchanged"),
    TextCase("json with 2^70", json(b'{"a": 1180591620717411303424}'), "a cat", '{"a":1180591620717411303424}',
             note="stored unchanged"),
    TextCase("json with NaN and 1e999", json(b'{"a": NaN, "b": 1e999}'), "a cat", '{"a":null,"b":null}',
             note="replaced by null"),
    TextCase("caption in json that is a number", lambda: [("json", b'{"caption": 5}')], None, '{"caption":5}',
             reasons=("no_text",)),
    TextCase("caption in a member that input.captions does not name", lambda: [("caption", b"a cat")], None,
             reasons=("no_text",), note="the detail lists the members"),
    TextCase("more members than limits.members", lambda: [("txt", b"a cat"), *((f"{i}.npy", b"x") for i in range(20))],
             "a cat", reasons=("members",), note="the first members are read"),
    TextCase("the same member twice", lambda: [("txt", b"one"), ("txt", b"two")], "one", reasons=("duplicate_key",),
             note="the first is kept"),
]  # fmt: skip
