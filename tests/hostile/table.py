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
PUBLISHED = "tests/engine/test_published.py"
BROKEN = "tests/engine/test_published_broken.py"
S3 = "tests/integration/test_s3_faults.py"
PARTIAL = "tests/integration/test_s3_partial.py"
SCARCITY = "tests/integration/test_scarcity.py"
CLUSTER = "tests/integration/test_cluster.py"
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
        f"{FAULTS}::test_what_passes_leaves_no_trace_and_a_shard_that_segfaults_each_time_is_quarantined",
    ),
    (
        "a model that raises at a shard",
        "tried again, then `shard_failed` in the layers of that model alone",
        f"{FAULTS}::test_a_model_that_always_raises_costs_its_own_layers_only",
    ),
    (
        "an embedding of NaN or infinity",
        "`not_finite`: the row is null in that layer",
        "tests/integration/test_run.py::test_a_row_whose_embedding_is_not_finite_is_null_and_named",
    ),
    (
        "an image that the published reinforcements do not have, and the other way round",
        "`not_reinforced`; `no_image`",
        f"{PUBLISHED}::test_samples_are_joined_by_key_or_uid_in_the_source_s_order",
    ),
    (
        "published augmentations that cannot be read, or are not of this image",
        "`reinforcement_broken`",
        f"{BROKEN}::test_what_cannot_be_read_costs_its_own_row",
    ),
    (
        "published captions or vectors that are pickles, unpack without end or are not what they say",
        "`reinforcement_broken`: the row is null in that layer; nothing is executed",
        f"{BROKEN}::test_what_cannot_be_read_costs_its_own_row",
    ),
    (
        "a storage that fails in the middle of a shard",
        "raised, so that the shard is tried again; not taken for damage",
        "tests/source/test_shards.py::test_storage_errors_that_may_pass_are_raised_after_the_samples_before_them",
    ),
    (
        "a special token of a tokenizer in a caption",
        "tokenized as plain characters",
        "tests/teachers/test_open_clip.py::test_special_tokens_in_captions_are_only_text",
    ),
    (
        "a header that damage may have robbed of its long name",
        "the member is passed over, not given another name",
        "tests/source/test_tar.py::test_a_member_behind_damage_whose_name_may_have_been_lost_is_not_given_another",
    ),
    (
        "damage in more than 100 places of a shard",
        "`shard_damaged`: the rest is not read",
        "tests/source/test_tar.py::test_damage_without_end_is_told_a_hundred_times_and_then_no_more",
    ),
    (
        "a shard of any length, a member of 100 MB",
        "memory stays at a few megabytes",
        "tests/source/test_shards.py::test_memory_does_not_grow_with_the_shard",
    ),
    (
        "any bytes whatever",
        "rows and refusals, within ten seconds and a gigabyte, and no sample is lost",
        "tests/fuzz/test_fuzz.py::test_nothing_is_lost_and_nothing_hangs",
    ),
]
ENDED = f"{FAULTS}::test_a_run_whose_driver_is_ended_goes_on_where_it_was"
ONCE = f"{FAULTS}::test_what_passes_leaves_no_trace_and_a_shard_that_segfaults_each_time_is_quarantined"
SECOND = f"{FAULTS}::test_a_second_run_is_refused_and_a_killed_worker_costs_nothing"
NODES = f"{CLUSTER}::test_the_pool_follows_the_cluster_and_a_lost_node_costs_no_shard"
FULL = f"{SCARCITY}::test_a_full_disk_ends_a_run_with_one_error_and_nothing_half_written"
MEMORY = f"{SCARCITY}::test_a_worker_that_the_memory_monitor_kills_costs_nothing"
PROCESSES = [
    ("kill -9 of a worker", "its shards go to another", SECOND),
    ("kill -9 of the driver", "the same command goes on where it was", ENDED),
    ("SIGTERM or Ctrl-C", "a clean stop; what is finished is kept, and the same command goes on", ENDED),
    ("a second run on a local dataset", "refused: another run is writing", SECOND),
    ("a worker that raises, or dies, once", "its shards are tried again", ONCE),
    (
        "a shard that segfaults its process each time",
        "`shard_crashed` after failures.solo_attempts alone; its neighbours finish",
        ONCE,
    ),
    (
        "a worker at which everything fails",
        "replaced by another; costs no shard",
        f"{FAULTS}::test_a_worker_at_which_everything_fails_is_replaced_and_costs_no_shard",
    ),
    ("a worker that Ray's memory monitor kills", "its shards run again, alone", MEMORY),
    ("a node that is lost, with all that runs on it", "counts against no shard", NODES),
    ("a node that joins late", "gets workers", NODES),
    ("a full disk", "one error; what is there is whole; goes on when there is room", FULL),
    (
        "clocks that are years apart, files from the past and the future",
        "nothing: only the monotonic clock decides anything",
        f"{FAULTS}::test_no_clock_but_the_monotonic_one_decides_anything",
    ),
]
PASSES = f"{S3}::test_faults_that_pass_leave_no_trace"
LASTS = f"{S3}::test_shards_that_cannot_be_read_are_quarantined_and_their_neighbours_finish"
STORAGE = [
    ("503 SlowDown or 500 for a while, whatever is asked", "asked again; the files of an undisturbed run", PASSES),
    ("500 on put for longer than is borne", "the shard is tried again; the files of an undisturbed run", PASSES),
    ("a connection lost in the middle of a body", "that block is read again", PASSES),
    ("reads that take long", "waited for", PASSES),
    ("an object that changes while it is read", "the shard is read anew: no mixture of the two", PASSES),
    ("an object that vanishes while it is read", "`shard_missing`", LASTS),
    ("503 for ever at one object", "`shard_failed` after a bounded number of requests", LASTS),
    ("permission denied for one object", "`shard_unreadable`", LASTS),
    (
        "permission denied for what is written",
        "a few attempts, then the run ends with one error; what is finished is kept",
        f"{S3}::test_an_output_that_refuses_files_is_one_clear_error",
    ),
    ("wrong credentials", "one error, at once", f"{S3}::test_wrong_credentials_are_one_clear_error"),
    (
        "an endpoint that is silent",
        "one error, after three minutes",
        f"{S3}::test_an_endpoint_that_is_silent_is_one_clear_error_and_soon",
    ),
    (
        "kill -9 in the middle of a multipart upload",
        "no object; the next run makes it (an orphaned upload is left for the bucket's lifecycle rule)",
        f"{PARTIAL}::test_a_process_killed_in_the_middle_of_an_upload_leaves_no_object",
    ),
    (
        "kill -9 while a file is put into an object store",
        "the same, and nothing is left in the machine's temporary folder",
        f"{PARTIAL}::test_a_process_killed_while_it_puts_a_file_leaves_none_on_its_machine",
    ),
    (
        "an error in the middle of a multipart upload",
        "no object, no orphan",
        f"{PARTIAL}::test_an_error_in_the_middle_of_an_upload_leaves_no_object",
    ),
    (
        "two runs at once into one dataset",
        "both put equal objects",
        f"{S3}::test_two_runs_at_once_put_equal_objects",
    ),
    (
        "many shards",
        "each layer is listed once in a run",
        f"{S3}::test_each_layer_is_listed_once_in_a_run",
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
[tests/hostile/test_run.py](../tests/hostile/test_run.py); `make fuzz` looks for further ones. Faults of processes and
storages are done for real, and what a run makes in spite of them is compared byte for byte with what an undisturbed one
makes; `make soak` does so with many faults, at random, for ten minutes.

This page is written from the cases by `python -m tests.hostile.table`.
"""


def document() -> str:
    """The page."""
    sections = [
        ("Images", ((c.defect, c.what, f"{RUN}::test_images[{slug(c.defect)}]") for c in IMAGES)),
        ("Captions and metadata", ((c.defect, c.what, f"{RUN}::test_texts[{slug(c.defect)}]") for c in TEXTS)),
        ("Shards", ((c.defect, c.what, f"{RUN}::test_tars[{slug(c.defect)}]") for c in TARS)),
        ("Beyond single files", iter(OTHERS)),
        ("Processes, nodes and disks", iter(PROCESSES)),
        ("Object stores", iter(STORAGE)),
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
