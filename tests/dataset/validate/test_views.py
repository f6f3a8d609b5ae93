"""`reinforce validate` on views: damaged files, other rows than those of the samples, inputs that have changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

import reinforce
from reinforce.dataset.drop import drop, plan_drop
from reinforce.dataset.files.store import Store
from reinforce.dataset.validate.validate import validate
from reinforce.errors import UserError
from tests.helpers.reinforced import flip, rewrite
from tests.helpers.views import as_version_1, make_view


@pytest.fixture
def viewed(dataset: Path) -> Path:
    """A copy of a dataset with a view."""
    make_view(dataset, "captions.namer[1] IS NOT NULL AND key LIKE '%1'", name="best")
    return dataset


def rows_file(url: Path) -> Path:
    return sorted(url.glob("views/best/rows-*/*"))[0]


def change_version_1(url: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    as_version_1(url, "best")
    rewrite(rows_file(url), change)


def one_more(table: pa.Table) -> pa.Table:
    """The rows with another one left out or kept."""
    left_out = table["left_out"].to_pylist()
    changed = [None if left_out[0] else "1 where", *left_out[1:]]
    return table.set_column(1, table.schema.field(1), pa.array(changed, pa.string()))


def reversed_keys(table: pa.Table) -> pa.Table:
    return table.set_column(0, table.schema.field(0), table["key"].take([*range(len(table))[::-1]]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda url: rows_file(url).unlink(), "view best has no rows of "),
        (lambda url: rewrite(rows_file(url), one_more), "does not have the digest that the view states"),
        (lambda url: change_version_1(url, one_more), "view best keeps other rows of "),
        (lambda url: change_version_1(url, lambda table: table.slice(1)), "view best is of other samples of "),
        (lambda url: change_version_1(url, reversed_keys), "view best is of other samples of "),
        (lambda url: flip(rows_file(url), "left_out"), "cannot be read"),
        (lambda url: next(url.glob("views/best/shards-*")).write_bytes(b"PAR1"), "does not have the digest that view"),
        (lambda url: as_version_1(url, "best").write_bytes(b"PAR1"), "shards.parquet cannot be read"),
        (
            lambda url: (url / "views/best/view.json").write_text(
                (url / "views/best/view.json").read_text().replace("%1", "%2")
            ),
            "does not have its fingerprint: it was changed",
        ),
    ],
)
def test_a_damaged_view_is_one_finding_and_is_not_read(
    viewed: Path, damage: Callable[[Path], object], message: str
) -> None:
    assert validate(str(viewed)).valid
    damage(viewed)
    found = validate(str(viewed))
    [finding] = found.findings
    assert message in finding.message
    assert (finding.kind, finding.layer, finding.at_fault) == ("view", "views/best", False)
    if "keeps other rows" not in message:  # of which that version states no digest
        with pytest.raises(UserError, match=r"[Mm]ake (it|the view) again"):
            list(reinforce.open(str(viewed), view="best"))


def test_a_view_of_a_dropped_layer_is_a_note(viewed: Path) -> None:
    store = Store(str(viewed))
    drop(store, plan_drop(store, ["captions/*", "embeddings/*/namer"]))
    found = validate(str(viewed))
    assert found.valid
    assert "view best is refused: captions/namer was dropped since view best was made. Make it again" in found.code[-1]
