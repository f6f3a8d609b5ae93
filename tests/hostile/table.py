"""docs/hostile.md from the cases: ``python -m tests.hostile.table`` writes it, and a test compares."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tests.hostile.images import IMAGES
from tests.hostile.tars import TARS
from tests.hostile.texts import TEXTS
from tests.hostile.words import slug

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "hostile.md"
RUN = "tests/hostile/test_run.py"
HANG = (
    "tests/hostile/test_hang.py::test_an_image_that_takes_minutes_and_a_model_that_stands_still_cost_their_shards_alone"
)
FAULTS = "tests/integration/test_faults.py"
#: What is shown elsewhere: defect, what happens, the test.
OTHERS = [
    (
        "an image that decodes for longer than failures.sample_seconds",
        "`shard_hung`, with its key: its worker is ended, the shards it had run alone, and the one that hangs again is "
        "quarantined",
        HANG,
    ),
    (
        "a model or a storage that stands still for failures.stall_seconds",
        "`shard_hung`, likewise",
        HANG,
    ),
    (
        "an image that kills its process",
        "`shard_crashed`, found in the same way",
        f"{FAULTS}::test_a_shard_that_kills_its_process_every_time_is_quarantined_and_its_neighbours_finish",
    ),
    (
        "a model that raises at a shard",
        "tried again, then `shard_failed` in the layers of that model alone",
        f"{FAULTS}::test_a_model_that_always_raises_costs_its_own_layers_only",
    ),
    (
        "a fault that passes: a lost connection, a full memory",
        "tried again; the files are those of an undisturbed run",
        f"{FAULTS}::test_a_fault_that_passes_leaves_no_trace",
    ),
    (
        "an embedding of NaN or infinity",
        "`not_finite`: the row is null in that layer",
        "tests/integration/test_run.py::test_a_row_whose_embedding_is_not_finite_is_null_and_named",
    ),
    (
        "a storage that fails in the middle of a shard",
        "raised, so that the shard is tried again; not taken for damage",
        "tests/test_source.py::test_storage_errors_that_may_pass_are_raised_after_the_samples_before_them",
    ),
    (
        "a special token of a tokenizer in a caption",
        "tokenized as plain characters",
        "tests/teachers/test_open_clip.py::test_special_tokens_in_captions_are_only_text",
    ),
    (
        "a header that damage may have robbed of its long name",
        "the member is passed over, not given another name",
        "tests/test_tar.py::test_a_member_behind_damage_whose_name_may_have_been_lost_is_not_given_another",
    ),
    (
        "damage in more than 100 places of a shard",
        "`shard_damaged`: the rest is not read",
        "tests/test_tar.py::test_damage_without_end_is_told_a_hundred_times_and_then_no_more",
    ),
    (
        "a shard of any length, a member of 100 MB",
        "memory stays at a few megabytes",
        "tests/test_source.py::test_memory_does_not_grow_with_the_shard",
    ),
    (
        "any bytes whatever",
        "rows and refusals, within ten seconds and a gigabyte, and no sample is lost",
        "tests/fuzz/test_fuzz.py::test_nothing_is_lost_and_nothing_hangs",
    ),
]
_HEAD = """\
# What becomes of bad data

Data from the web is broken in every way, and a run over it must end with each sample either in the dataset or in
quarantine with its reason. This is each defect that the tests build, what happens, and the test that shows it.

- A *reason* in `code` is one of [schemas/reasons.py](../schemas/reasons.py). It stands in
  `quarantine/samples/<shard>.parquet`, beside the key (null for the shard as a whole) and a detail for people.
- *kept* means that the sample is a row. A reason beside it says what of the sample was left out.
- Bounds stand in the config, under `input.limits` and `failures`; the detail of a refusal names the one that was met.
- `reinforce status` counts the reasons, and `reinforce run --retry-quarantined` tries shards again that were given up.

Cases marked by a name in brackets are of one real run over shards with all these defects,
[tests/hostile/test_run.py](../tests/hostile/test_run.py); `make fuzz` looks for further ones.

This page is written from the cases by `python -m tests.hostile.table`.
"""


def document() -> str:
    """The page."""
    sections = [
        ("Images", ((c.defect, c.what, f"{RUN}::test_images[{slug(c.defect)}]") for c in IMAGES)),
        ("Captions and metadata", ((c.defect, c.what, f"{RUN}::test_texts[{slug(c.defect)}]") for c in TEXTS)),
        ("Shards", ((c.defect, c.what, f"{RUN}::test_tars[{slug(c.defect)}]") for c in TARS)),
        ("Beyond single files", iter(OTHERS)),
    ]
    return _HEAD + "".join(f"\n## {title}\n\n{_table(rows)}" for title, rows in sections)


def _table(rows: Iterable[tuple[str, str, str]]) -> str:
    lines = ["| defect | what happens | shown by |", "| --- | --- | --- |"]
    for defect, what, test in rows:
        shown = test.partition("::")[2]
        shown = shown[shown.index("[") :] if "[" in shown else f"{test.partition('::')[0]}, {shown}"
        lines.append(f"| {_cell(defect)} | {_cell(what)} | `{shown}` |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(document(), encoding="utf-8")
