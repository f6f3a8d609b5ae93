"""Cases of docs/hostile.md that other tests show: defect, outcome, test."""

from __future__ import annotations

POLLS = "tests/engine/driver/test_polls.py"
CLAIMS = "tests/dataset/test_claims.py"
HANG = "tests/hostile/test_hang.py::test_a_slow_image_costs_its_sample_and_a_hung_model_its_shard"
FAULTS = "tests/integration/test_faults.py"
PUBLISHED = "tests/engine/test_published.py"
BROKEN = "tests/engine/test_published_members.py"
S3 = "tests/integration/test_s3_faults.py"
PARTIAL = "tests/integration/test_s3_partial.py"
SCARCITY = "tests/integration/test_scarcity.py"
CLUSTER = "tests/integration/test_cluster.py"
SOURCES = "tests/engine/plan/test_duplicates.py"
CHANGES = "tests/engine/plan/test_changed_sources.py"
EXPORT = "tests/publishing/test_datacompdr.py"
CARD = "tests/publishing/test_card.py"
DECODE_POOL = "tests/engine/decode/test_pool.py"
ENDED = f"{FAULTS}::test_a_run_whose_driver_was_killed_or_interrupted_resumes"
ONCE = f"{FAULTS}::test_single_failures_leave_no_trace_and_lasting_ones_cost_a_shard_or_the_layers_of_a_model"
SECOND = f"{FAULTS}::test_a_second_run_is_refused_a_killed_worker_is_replaced_and_a_terminated_run_resumes"
#: Cases of other tests: defect, outcome, test.
OTHERS = [
    (
        "an image that takes longer to decode than failures.sample_seconds",
        "`image_hung`: its decode process is replaced, the image begins again, and is refused if that happens "
        "failures.solo_attempts times; every other image is decoded",
        HANG,
    ),
    (
        "a model or a storage that makes no progress in one step of a shard",
        "`shard_hung`: the worker is killed, that shard runs alone, and is quarantined if it hangs again",
        HANG,
    ),
    (
        "10,000 workers that are asked in turns for their progress, 40 of which hang",
        "these are found within a round, and no healthy one is killed",
        f"{POLLS}::test_no_healthy_worker_is_killed_and_every_hang_is_found_in_time_in_a_large_cluster",
    ),
    (
        "an image that crashes its decoder",
        "`image_crashed`, in the same way as `image_hung`",
        f"{DECODE_POOL}::test_an_image_that_crashes_its_process_is_refused_and_all_others_are_decoded",
    ),
    (
        "a model that raises an exception for a shard",
        "retried, then `shard_failed`, only in the layers of that model",
        ONCE,
    ),
    (
        "an embedding of NaN or infinity",
        "`not_finite`: the row is null in that layer",
        "tests/engine/test_shard_contents.py::test_a_row_whose_embedding_is_not_finite_is_null_and_quarantined",
    ),
    (
        "an image without published reinforcements, and published reinforcements without an image",
        "`not_reinforced`; `no_image`",
        f"{PUBLISHED}::test_samples_are_matched_by_key_or_uid_in_source_order",
    ),
    (
        "published augmentations that cannot be read or do not fit the image",
        "`reinforcement_broken`",
        f"{BROKEN}::test_an_unreadable_member_costs_its_own_row_only",
    ),
    (
        "published captions or vectors that are pickles, decompression bombs or of a wrong type",
        "`reinforcement_broken`: the row is null in that layer; nothing is executed",
        f"{BROKEN}::test_an_unreadable_member_costs_its_own_row_only",
    ),
    (
        "a storage that fails in the middle of a shard",
        "raised, so that the shard is retried; not mistaken for damage",
        "tests/source/test_streams.py::test_temporary_storage_errors_are_raised_after_the_samples_before_them",
    ),
    (
        "a source file of Parquet that is damaged in a row group",
        "`shard_damaged`: the rows of this row group that were not read yet are left out, all others are kept",
        "tests/source/formats/test_parquet.py::test_a_damaged_row_group_costs_its_rows_only",
    ),
    (
        "a source file of Parquet of kilobytes that asks its decoder for gigabytes",
        "`shard_damaged` or `shard_unreadable`: footers, pages and batches are bounded before they are decoded",
        "tests/parquet/test_pages.py::test_files_of_kilobytes_do_not_need_gigabytes",
    ),
    (
        "rows of a table whose image is null, of another type or no base64, and lines that are no JSON",
        "`no_image`, `image_broken`, `row_broken`: only these rows are refused",
        "tests/source/formats/test_lines.py::test_broken_lines_cost_their_rows",
    ),
    (
        "a table that names an absolute path, `..`, another file system, or a URL of a private address",
        "`image_place`: not read, unless input.images_from allows it",
        "tests/source/linked_images/test_places.py::test_paths_of_a_table_are_relative_to_its_folder_and_stay_in_it",
    ),
    (
        "an image of a folder that is gone before its shard is computed",
        "`image_missing`: only its sample is refused",
        "tests/source/formats/test_folder.py::test_files_that_disappear_cost_their_samples_and_a_list_is_written_once",
    ),
    (
        "a special token of a tokenizer in a caption",
        "tokenized as plain characters",
        "tests/teachers/test_open_clip_text.py::test_special_tokens_in_texts_are_read_as_plain_text",
    ),
    (
        "a source that was moved or linked",
        "refused: its shards have the content of others; `moved` in the config continues under the old names",
        f"{SOURCES}::test_a_linked_source_is_refused_with_numbers_and_both_urls",
    ),
    (
        "a relative source in a job of `ray job submit`",
        "refused: its shards would have other names in every job",
        f"{SOURCES}::test_a_source_in_the_folder_of_a_ray_job_is_refused",
    ),
    (
        "a source file that was replaced since its samples were written",
        "a run that adds layers warns, where it lists the source",
        f"{CHANGES}::test_replaced_sources_of_shards_that_get_new_layers_are_named",
    ),
    (
        "a replaced tar whose images are stored by reference",
        "`shard_failed`, only in the layers that need its images",
        f"{CHANGES}::test_a_replaced_tar_of_referenced_images_costs_its_shard_instead_of_giving_other_images",
    ),
    (
        "a custom class whose file changed without its `version`, while shards are added",
        "a run warns once, with the hashes of both files",
        "tests/engine/test_run.py::test_a_class_whose_file_changed_without_its_version_is_warned_of_once",
    ),
    (
        "keys that occur in several shards",
        "stored, counted, and reported by runs, status and validate",
        "tests/dataset/validate/test_validate.py::test_keys_that_repeat_across_shards_are_counted",
    ),
    (
        "a header whose long name may be lost in damage",
        "the member is skipped, not read under another name",
        "tests/source/test_tar.py::test_a_member_after_damage_that_may_have_lost_its_name_is_skipped",
    ),
    (
        "damage in more than 100 places of a shard",
        "`shard_damaged`: the rest is not read",
        "tests/source/test_tar.py::test_at_most_a_hundred_damages_are_reported",
    ),
    (
        "a shard of any length, a member of 100 MB",
        "memory stays at a few megabytes",
        "tests/source/formats/test_tar.py::test_memory_does_not_grow_with_the_shard",
    ),
    (
        "arbitrary bytes",
        "rows and refusals, within 10 seconds and 1 GB; no sample is lost",
        "tests/fuzz/test_fuzz.py::test_no_sample_is_lost_and_nothing_hangs",
    ),
    (
        "a dataset whose keys lead out of a folder, exported to tars",
        "`..` and dots become %XX in the names of members; a key that cannot name a member is left out and counted",
        f"{EXPORT}::test_images_that_readers_would_decode_otherwise_are_converted_or_left_out",
    ),
    (
        "a dataset.json whose models and policies contain Markdown, HTML or YAML, in `reinforce card`",
        "shown as text: the front matter and the tables keep their form",
        f"{CARD}::test_what_comes_from_data_is_escaped",
    ),
]
NODES = f"{CLUSTER}::test_the_pool_follows_the_cluster_and_lost_and_drained_nodes_cost_no_shard"
FULL = f"{SCARCITY}::test_a_full_disk_ends_a_run_with_one_error_and_nothing_half_written"
MEMORY = f"{SCARCITY}::test_a_worker_killed_by_the_memory_monitor_costs_no_shard"
KILLED = f"{DECODE_POOL}::test_processes_that_are_killed_are_replaced"
ORPHANED = f"{DECODE_POOL}::test_no_process_outlives_its_parent_not_even_inside_a_decoder"
PROCESSES = [
    ("kill -9 of a worker", "its shards go to another worker", SECOND),
    ("kill -9 of a decode process", "its images are decoded by the next one", KILLED),
    ("a decode process whose worker is gone", "the kernel kills it, even inside a decoder", ORPHANED),
    ("kill -9 of the driver", "the same command resumes the run", ENDED),
    ("SIGTERM or Ctrl-C", "a clean stop; finished shards are kept, and the same command resumes the run", SECOND),
    ("a second run on a local dataset", "refused: another run is writing", SECOND),
    ("a worker that raises an exception or dies once", "its shards are retried", ONCE),
    (
        "a shard whose model segfaults each time",
        "`shard_crashed` after failures.solo_attempts attempts alone; the other shards finish",
        ONCE,
    ),
    (
        "a worker on which every shard fails",
        "replaced by another worker; costs no shard",
        f"{FAULTS}::test_a_worker_at_which_every_lease_fails_is_replaced_and_no_shard_is_quarantined",
    ),
    ("a worker that Ray's memory monitor kills", "counts against no shard", MEMORY),
    (
        "a model that leaks memory until its worker is killed, again and again",
        "counts against no shard; the run names the worker, its growth per shard and `workers.recycle`",
        "tests/engine/driver/policy/test_memory.py::test_a_leaking_worker_costs_no_shard_however_often_it_is_killed",
    ),
    (
        "a node whose TMPDIR is full",
        "its shards pass on other nodes; its workers are replaced, and it gets no new ones for a while",
        "tests/integration/test_faulty_node.py::test_a_node_with_a_full_temporary_folder_costs_no_shard_and_is_avoided",
    ),
    ("a lost node with its workers", "counts against no shard", NODES),
    ("a node that joins late", "gets workers", NODES),
    ("a full disk", "one error; no partial files; the same command resumes when there is space", FULL),
    (
        "clocks that differ by years, files from the past and the future",
        "no effect: only the monotonic clock is used",
        f"{FAULTS}::test_only_the_monotonic_clock_affects_a_run",
    ),
]
DATASET = "tests/hostile/test_datasets.py"
REFERENCES = "tests/source/test_references.py"
FOLDER = "tests/hostile/test_working_folder.py"
DATASETS = [
    (
        "an image by reference to a file or an address that the reader has not named",
        "an error that names the folder to add; nothing is opened",
        f"{REFERENCES}::test_the_error_names_what_to_add",
    ),
    (
        "a reference with chained file systems, another scheme, `..`, a link-local address or of any length",
        "refused, also where its folder is named",
        f"{REFERENCES}::test_a_url_that_no_run_writes_is_refused_also_where_its_folder_is_named",
    ),
    (
        "a reference to a web server that redirects it",
        "not followed",
        f"{REFERENCES}::test_a_web_server_cannot_redirect_a_reference",
    ),
    (
        "a reference of terabytes, or before the beginning of a file",
        "refused before anything is read",
        f"{REFERENCES}::test_impossible_ranges_are_refused_before_anything_is_read",
    ),
    (
        "references in a dataset that embeds its images by its dataset.json",
        "an error; nothing is opened",
        f"{DATASET}::test_an_embedding_dataset_follows_no_reference",
    ),
    (
        "files with the names of packages in the folder of the dataset",
        "not imported",
        f"{FOLDER}::test_a_command_about_a_dataset_runs_no_file_of_it",
    ),
    (
        "a type in a file's schema that a library creates by running code",
        "not created; the column has the type of the format",
        f"{DATASET}::test_types_of_libraries_in_a_schema_are_not_created",
    ),
    (
        "an image of gigabytes, and limits in dataset.json that allow it",
        "refused by the reader's own limit",
        f"{DATASET}::test_limits_are_those_of_the_reader",
    ),
    (
        "augmentation records of billions of pixels, or with operations and numbers that no run samples",
        "an error",
        f"{DATASET}::test_operations_that_no_run_samples_are_refused",
    ),
    (
        "JSON that is nested deeply, of gigabytes or of other bytes",
        "an error",
        f"{DATASET}::test_a_manifest_that_is_no_manifest",
    ),
    (
        "pipes and devices in place of files",
        "an error; nothing blocks",
        f"{DATASET}::test_pipes_and_devices_in_place_of_files_do_not_block",
    ),
    (
        "escape sequences in names of files and in the summary of a run",
        "shown as `\\x1b`, or not listed",
        f"{DATASET}::test_a_terminal_is_not_controlled_by_a_status",
    ),
    (
        "any bytes changed in the files of a finished dataset",
        "samples or an error, within 10 seconds and 1 GB",
        "tests/fuzz/test_fuzz.py::test_no_sample_is_lost_and_nothing_hangs",
    ),
]
PASSES = f"{S3}::test_transient_faults_leave_no_trace"
LASTS = f"{S3}::test_shards_that_cannot_be_read_are_quarantined_and_their_neighbours_finish"
STORAGE = [
    ("503 SlowDown or 500 for a while, for any request", "retried; the same files as without the fault", PASSES),
    ("500 on put for longer than the retries", "the shard is retried; the same files as without the fault", PASSES),
    ("a connection lost in the middle of a body", "the block is read again", PASSES),
    ("slow reads", "no effect", PASSES),
    (
        "an object that changes while it is read",
        "the shard is read again, so that versions are not mixed",
        PASSES,
    ),
    ("an object that vanishes while it is read", "`shard_missing`", LASTS),
    ("503 for one object, permanently", "`shard_failed` after a bounded number of requests", LASTS),
    ("permission denied for one object", "`shard_unreadable`", LASTS),
    (
        "permission denied for writing",
        "a few attempts, then the run ends with one error; finished shards are kept",
        f"{S3}::test_an_output_that_refuses_files_is_one_clear_error",
    ),
    ("wrong credentials", "one error, at once", f"{S3}::test_wrong_credentials_are_one_clear_error"),
    (
        "an endpoint that does not answer",
        "one error, after three minutes",
        f"{S3}::test_an_endpoint_that_does_not_answer_is_one_clear_error",
    ),
    (
        "kill -9 in the middle of a multipart upload",
        "no object; the next run writes it (the lifecycle rule of the bucket removes the orphaned upload)",
        f"{PARTIAL}::test_a_process_killed_in_the_middle_of_an_upload_leaves_no_object",
    ),
    (
        "kill -9 while a file is put into an object store",
        "the same, and no file is left in the temporary folder of the machine",
        f"{PARTIAL}::test_a_process_killed_while_it_puts_a_file_leaves_none_on_its_machine",
    ),
    (
        "an error in the middle of a multipart upload",
        "no object, no orphaned upload",
        f"{PARTIAL}::test_an_error_in_the_middle_of_an_upload_leaves_no_object",
    ),
    (
        "two concurrent runs of one config",
        "both put equal objects",
        f"{S3}::test_two_runs_at_once_put_equal_objects",
    ),
    (
        "two concurrent runs of configs with different seeds",
        "the second one is refused at its start with what differs; conditional puts decide",
        f"{CLAIMS}::test_a_second_run_with_another_seed_is_refused_with_what_differs_and_one_of_the_same_config_is_not",
    ),
    (
        "many shards",
        "each layer is listed once per run",
        f"{S3}::test_each_layer_is_listed_once_in_a_run",
    ),
]
