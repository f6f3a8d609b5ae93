"""Footers of Parquet files: accepted one by one or together, and without a loss of memory."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reinforce.parquet import footers
from reinforce.parquet.footers import FooterCheck, RefusedFile, check_together, footer_bytes, read_footer
from tests.hostile.parquet import REQUIRED, Column, File, Page, i64, text

NAMES = ["key"]


@pytest.fixture(autouse=True)
def _nothing_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footers, "_accepted", set())


def footer_of(data: bytes) -> tuple[pq.FileMetaData, list[str], bytes]:
    footer = read_footer(data, len(data))
    assert footer is not None
    return footer, NAMES, footer_bytes(data)


def one_key(key: bytes, offset: int | None = None) -> bytes:
    extra = {} if offset is None else {9: i64(offset)}
    return File([Column([("key", REQUIRED)], [Page(text(key), 1)], extra=extra)], 1).encoded()


def accepted_before(found: tuple[pq.FileMetaData, list[str], bytes], monkeypatch: pytest.MonkeyPatch) -> bool:
    with monkeypatch.context() as context:
        context.setattr(FooterCheck, "_begin", lambda *_: (_ for _ in ()).throw(RefusedFile("it is checked")))
        return FooterCheck(*found).accepted


def test_footers_of_equal_columns_are_checked_once_and_others_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    bad, sink = footer_of(one_key(b"b", offset=-5)), pa.BufferOutputStream()
    with pytest.raises(RefusedFile, match="its footer cannot be used"):
        FooterCheck(*bad).check(0)
    pq.write_table(pa.table({"key": [1]}), sink)
    good = [footer_of(one_key(bytes([letter]))) for letter in b"abc"]
    for other in (bad, footer_of(sink.getvalue().to_pybytes())):  # that Arrow rejects, and of another schema
        found = [good[0], other, good[2]]
        check_together(found)
        assert not any(accepted_before(one, monkeypatch) for one in found)
    check_together(good)
    assert all(accepted_before(one, monkeypatch) for one in good)
    assert not FooterCheck(*bad).accepted


def test_a_check_keeps_no_memory() -> None:
    footer, names, _ = footer_of(one_key(b"a"))
    FooterCheck(footer, names)
    before = _resident()
    for _ in range(500):
        assert FooterCheck(footer, names).accepted
    assert _resident() - before < 2**20, "Arrow kept 5 KB for each exception in a file of Python"


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
