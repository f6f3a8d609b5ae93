"""Views: what rules keep, exactly and the same each time, how a view is read, and what is refused."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import reinforce
from reinforce.dataset.manifest import read_manifest
from reinforce.dataset.store import Store
from reinforce.dataset.view import list_views, view_fingerprint, write_view
from reinforce.errors import UserError
from reinforce.explore import passes
from reinforce.explore import rules as thresholds
from reinforce.explore.expressions import check
from reinforce.explore.report import inspect
from reinforce.explore.rules import Counts, ThresholdSearch, number, ordered
from reinforce.explore.select import report_lines
from tests.helpers.commands import Command
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.reinforced import manifest_to_change, reinforce_here, rewrite
from tests.helpers.views import keys_of, make_view, reasons_of, rows_of

SHARDS, ROWS = 3, 20
SCORES = {"match": {"similarity": "red", "texts": ["caption", "namer"]}, "sizes": {"facts": ["words", "bytes"]}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with scores; one sample of each shard has no caption."""
    folder = tmp_path_factory.mktemp("dataset")
    for shard in range(SHARDS):
        members = [member for member in members_of(shard, ROWS) if member[0] != f"{shard:03d}00004.txt"]
        write_tar(folder / "source" / f"{shard}.tar", members)
    config = config_of(f"{folder}/source/*.tar", folder / "out", scores=SCORES)
    del config["teachers"]["blue"]
    reinforce_here(config)
    return folder / "out"


@pytest.fixture
def url(made: Path, tmp_path: Path) -> str:
    return str(shutil.copytree(made, tmp_path / "out"))


def scores(url: str, score: str) -> dict[str, Any]:
    layer, _, name = score.partition(".")
    return {sample.key: sample.values[f"scores/{layer}"][name] for sample in reinforce.open(url)}


NUMBERS = "regexp_extract_all(caption, '[0-9]+')"
NAN = "CASE WHEN key LIKE '000%' THEN 'nan'::DOUBLE ELSE width END"


def matches(sample: reinforce.Sample) -> bool:
    return (sample.values["scores/match"]["caption_mean"] or 0) > 0 and not sample.key.startswith("001")


def large(sample: reinforce.Sample) -> bool:
    return any(word.isdecimal() and int(word) > 10 for word in (sample.caption or "").split(" "))


@pytest.mark.parametrize(
    ("text", "keeps", "null"),
    [
        ("scores.match.caption_mean > 0 AND metadata->>'uid' NOT LIKE '001%'", matches, 2),  # the third is false
        (f"len(list_filter({NUMBERS}, lambda n: try_cast(n AS INT) > width / 4)) > 0", large, 3),
        (f"len(list_filter({NUMBERS}, n -> n::INT > width / 4)) > 0 AND (metadata->'uid') IS NOT NULL", large, 3),
        (f"len([n FOR n IN {NUMBERS} IF n::INT > width / 4]) > 0", large, 3),
        (f"nullif({NAN}, 'nan') > 0", lambda sample: not sample.key.startswith("000"), ROWS),
    ],
)
def test_where_keeps_the_samples_for_which_it_is_true(
    url: str, text: str, keeps: Callable[[reinforce.Sample], bool], null: int
) -> None:
    view = make_view(url, text)
    wanted = [sample.key for sample in reinforce.open(url) if keeps(sample)]
    assert keys_of(url) == wanted
    assert 0 < len(wanted) == len(reinforce.open(url, view="some")) < SHARDS * ROWS
    assert [(line["rows"], line["null"]) for line in view.report] == [(SHARDS * ROWS, null)]


def test_nan_is_no_value_of_a_number(url: str) -> None:
    views = [make_view(url, {"keep": {"top": 1.0, "by": NAN}}), make_view(url, f"{NAN} > 0")]
    rows = [(line["null"], line["left_out"]) for view in views for line in view.report]
    assert rows == [(ROWS, ROWS), (0, 0)], "duckdb's NaN is larger than any number"


@pytest.mark.parametrize("top", [7, 0.25, 1.0, 1000])
@pytest.mark.parametrize("within", [None, "length(captions.namer[1]) % 3"])
def test_keep_takes_samples_with_the_largest_values_of_all_or_each_group(url: str, top: float, within: str) -> None:
    view = make_view(url, {"keep": {"top": top, "by": "scores.match.caption_mean", "within": within}})
    groups: dict[int, list[tuple[float, str]]] = {}
    for sample in reinforce.open(url):
        if (value := sample.values["scores/match"]["caption_mean"]) is not None:
            group = len(sample.captions["namer"][0]) % 3 if within else 0
            groups.setdefault(group, []).append((value, sample.key))
    counts = {group: max(1, round(top * len(of))) if isinstance(top, float) else top for group, of in groups.items()}
    best = [one for group, of in groups.items() for one in sorted(of, reverse=True)[: counts[group]]]
    assert {*keys_of(url)} == {key for _, key in best}
    [line] = view.report
    assert (line["null"], line["left_out"]) == (3, SHARDS * ROWS - len(best))
    assert line.get("groups", 1) == len(groups) == (3 if within else 1)
    if not within and line["left_out"] > 3:
        assert line["threshold"] == pytest.approx(min(best)[0])


def test_a_view_has_the_values_of_each_keep_and_inspect_computes_no_expression_of_it(url: str, tmp_path: Path) -> None:
    by = "scores.match.caption_mean"
    view = make_view(url, {"keep": {"top": 0.9, "by": by}}, "width > 0", {"keep": {"top": 20, "by": "width / 7"}})
    stored = [row["values"] for row in rows_of(url)]
    expected = [(sample.values["scores/match"]["caption_mean"], sample.width / 7) for sample in reinforce.open(url)]
    missing = [(np.nan if one is None else one, other) for one, other in expected]
    np.testing.assert_array_equal(np.array(stored, np.float32), np.array(missing, np.float32))

    rules = [
        {**rule, "keep": {**rule["keep"], "by": "no expression"}} if "keep" in rule else rule for rule in view.rules
    ]
    fingerprint = view_fingerprint(rules, view.seed, view.inputs, view.counts, view.files)
    Path(url, "views/some", f"rows-{view.fingerprint}").rename(Path(url, "views/some", f"rows-{fingerprint}"))
    write_view(Store(url), replace(view, rules=rules, fingerprint=fingerprint))
    found = inspect(url, str(tmp_path / "report"), view="some")
    assert (found.rows, found.problems) == (len(view), 0)
    page = (tmp_path / "report" / "view.html").read_text()
    lowest = np.nanmin([one for one, _ in missing])
    assert "Left out, next to the threshold first" in page
    assert f"{lowest:.4g}" in page


def test_keep_compares_numbers_as_float64(url: str) -> None:
    """As float32 they are all equal, and all would be kept."""
    number = "100000000 + key::INTEGER % 100"
    view = make_view(url, {"keep": {"top": 6, "by": number}})
    numbers = {sample.key: int(sample.key) % 100 for sample in reinforce.open(url)}
    assert sorted(numbers[key] for key in keys_of(url)) == sorted(numbers.values())[-6:]
    assert view.report[0]["threshold"] == 100_000_000 + sorted(numbers.values())[-6]


def test_keep_compares_integers_above_2_to_53_exactly_and_refuses_those_of_other_types(url: str) -> None:
    """As float64 several of them are equal to the threshold, so that more would be kept."""
    number = f"({2**53} + key::INTEGER % 100 + {ROWS} * (key::INTEGER // 100000))"
    keys = keys_of(url, None)
    for text, best in ((number, keys[-12:]), (f"{number}::UBIGINT", keys[-12:]), (f"-{number}", keys[:12])):
        view = make_view(url, {"keep": {"top": 12, "by": text}})
        assert keys_of(url) == best
    assert next(iter(report_lines(view))).endswith("; keeps values of at least -9,007,199,254,741,003")
    for text in (f"{number}::HUGEINT", f"list_sum([{number}])", f"{number} + 0.1::DECIMAL(38, 1)"):
        with pytest.raises(UserError, match=r"gives numbers of decimal128.* that float64 does not have, .* Cast it to"):
            make_view(url, {"keep": {"top": 12, "by": text}})
    with pytest.raises(UserError, match="gives numbers of int64 that float64 does not have"):
        make_view(url, {"deduplicate": {"exact": True, "keep": number}})
    make_view(url, {"keep": {"top": 12, "by": "width * 0.1 + list_sum([height, key::INTEGER])"}})
    assert keys_of(url) == keys[-12:]


def test_keep_of_minus_zero_and_zero_keeps_both(url: str) -> None:
    zeros = "CASE right(key, 1) WHEN '1' THEN '-0.0'::DOUBLE WHEN '2' THEN 0.0 ELSE -1 END"
    for text in (zeros, f"({zeros})::FLOAT"):
        make_view(url, {"keep": {"top": 1, "by": text}})
        assert {key[-1] for key in keys_of(url)} == {"1", "2"}


def test_rules_apply_in_order_and_rows_say_which_left_them_out(url: str) -> None:
    sql = ("captions.namer[1] IS NOT NULL AND width = 40", "scores.match.caption_max > 0.1")
    make_view(url, *sql, {"sample": 12}, {"keep": {"top": 5, "by": "-scores.sizes.bytes"}})
    match, sizes = scores(url, "match.caption_max"), scores(url, "sizes.bytes")
    reasons = dict(zip(match, reasons_of(url), strict=True))
    for key, reason in reasons.items():
        assert (reason == "2 where: null") == (match[key] is None)
        assert (reason == "2 where") == (match[key] is not None and match[key] <= 0.1)
    sampled = [key for key, reason in reasons.items() if reason in (None, "4 keep")]
    assert len(sampled) == 12
    largest = sorted(sizes[key] for key in sampled)[4]  # samples of equal size are all kept
    assert {key for key in sampled if reasons[key] is None} == {key for key in sampled if sizes[key] <= largest}


def test_a_sample_depends_on_seed_and_key_alone_and_all_but_is_the_rest(url: str) -> None:
    def taken(*rules: str | dict[str, Any], seed: int = 0) -> list[str]:
        make_view(url, *rules, seed=seed)
        return keys_of(url)

    rule = {"sample": 20}
    first = taken(rule)
    assert len(first) == 20
    shutil.rmtree(Path(url, "views"))
    assert taken(rule) == first != taken(rule, seed=1)
    assert taken("width > 0", rule) == first, "rules before it change nothing if they keep all"
    for text in ("width > 0", "scores.match.caption_max > 0.1"):
        sampled, others = ({*taken(text, {name: 7}, seed=3)} for name in ("sample", "all_but"))
        assert len(sampled) == 7
        assert others == {*taken(text)} - sampled


@pytest.mark.parametrize("few", [thresholds._FEW, 0])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint64"])
@given(data=st.data(), top=st.one_of(st.integers(1, 60), st.floats(0.01, 1.0)))
def test_thresholds_of_groups_are_exact_for_any_numbers(few: int, dtype: str, data: st.DataObject, top: float) -> None:
    one = {
        "float32": st.floats(width=32, allow_nan=False),
        "float64": st.floats(allow_nan=False),
        "int64": st.integers(-(2**63), 2**63 - 1),
        "uint64": st.integers(0, 2**64 - 1),
    }
    pairs = data.draw(st.lists(st.tuples(st.integers(0, 3), one[dtype]), min_size=1, max_size=50))
    groups, values = np.array([group for group, _ in pairs], np.uint64), np.array([one for _, one in pairs], dtype)
    parts = [(groups[part], ordered(values[part])) for part in (slice(0, None, 2), slice(1, None, 2))]
    search = ThresholdSearch(8 * values.dtype.itemsize)
    with mock.patch.object(thresholds, "_FEW", few):
        while search.left:
            search = search.narrowed(Counts.sum(search.counts(*part) for part in parts), top)
    for group, found in zip(search.groups, search.prefix, strict=True):
        ordered_values = sorted(values[groups == group].tolist(), reverse=True)
        count = len(ordered_values)
        wanted = min(count, max(1, round(top * count))) if isinstance(top, float) else min(count, top)
        assert number(int(found), dtype) == ordered_values[wanted - 1]
    assert {*search.groups.tolist()} == {*groups.tolist()}


def test_a_view_that_is_made_again_replaces_the_first_unless_its_rules_leave_nothing(url: str) -> None:
    make_view(url, {"sample": 6})
    make_view(url, {"sample": 5})
    assert list_views(Store(url)) == ["some"]
    with pytest.raises(UserError, match="the rules keep no sample: rule 1 where leaves out the last; view some is not"):
        make_view(url, "width > 4000", {"sample": 3})
    assert len(keys_of(url)) == 5
    assert len([*Path(url, "views/some").glob("*/*")]) == SHARDS, "of the earlier view alone"


def test_without_scores_a_column_that_is_missing_names_the_key_that_adds_them(url: str) -> None:
    manifest = read_manifest(Store(url))
    layers = {name: entry for name, entry in manifest["layers"].items() if not name.startswith("scores/")}
    manifest = {**manifest, "layers": layers}
    with pytest.raises(UserError, match=r"no column agreement\. .* It has no scores: entries of `scores:` in"):
        check("agreement > 0.3", manifest, "rules.0.where", "boolean")


def test_columns_of_names_with_dashes_are_shown_as_sql_takes_them(url: str) -> None:
    manifest = read_manifest(Store(url))
    manifest = {**manifest, "layers": {"scores/match-b": manifest["layers"]["scores/match"]}}
    with pytest.raises(UserError, match=r'no column scores\.match\..* scores\."match-b"\.caption_mean,'):
        check("scores.match-b.caption_mean > 0", manifest, "rules.0.where", "boolean")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"where": "scores.match.caption_mean >"}, "rules.0.where: 'scores.match.caption_mean >' is not an expression"),
    ({"where": "1 < 2"}, "names no column. It may name key, caption, metadata, width, height, captions.namer, scores"),
    ({"where": "scores.match.beauty > 1"}, "there is no column scores.match.beauty. It may name key"),
    ({"where": "scores.new > 1"}, "An entry of `scores:` in the config of `reinforce run` adds one."),
    ({"where": "width + 1"}, "is INTEGER, and must be true or false"),
    ({"keep": {"top": 3, "by": "caption"}}, "rules.0.keep.by: 'caption' is VARCHAR, and must be a number"),
    ({"where": "lenght(caption) > 3"}, "lenght"),
    ({"where": "key IN (SELECT key FROM read_csv('/etc/passwd'))"}, "without SELECT, FROM and subqueries"),
    ({"where": "true FROM read_text('/etc/passwd')"}, "without SELECT, FROM and subqueries"),
    ({"where": "width > 0) OR (true"}, "is not an expression of SQL"),
    ({"where": "avg(width) > 30"}, "has avg, an aggregate of several rows. An expression is computed from the sample"),
    ({"keep": {"top": 3, "by": "geomean(width)"}}, "has geomean, which has avg, an aggregate of several rows"),
    ({"keep": {"top": 3, "by": "unnest([width, 1])"}}, "has unnest, which does not make one value of one row"),
    ({"keep": {"top": 3, "by": "width", "within": "regexp_split_to_table(key, '0')"}}, "which has unnest, which does"),
    ({"where": "row_number() OVER () > width"}, "has a window over several rows"),
    ({"where": "COLUMNS('w.*') > 1"}, "without SELECT, FROM and subqueries"),
    ({"where": "width > 100 * random()"}, "has random, whose value does not depend on the sample's own row alone"),
    ({"where": "hash(key) % 2 = 1"}, "has hash, whose value depends on the version of duckdb. Use md5_number_lower."),
    ({"where": "version() = key"}, "has version, whose value depends on the version of duckdb"),
    ({"where": "list_transform([key], lambda x: HASH(x))[1] > 1"}, "has hash, whose value depends on the version"),
    ({"where": "list_approx_count_distinct([key]) = 1"}, "which has list_aggr of an estimate, whose value depends on"),
    ({"where": "list_aggregate([width], 'su' || 'm') = 1"}, "has list_aggregate of an aggregate whose name is no"),
    ({"where": "json_serialize_plan(key) = caption"}, "has json_serialize_plan, whose value depends on the version"),
    ({"where": "current_setting('TimeZone') = key"}, "has current_setting, whose value does not depend on the"),
    ({"where": "getvariable('x') = key"}, "has getvariable, whose value does not depend on the sample's own row"),
    ({"where": "uuid()::VARCHAR = key"}, "has uuid, whose value does not depend on the sample's own row alone"),
    ({"where": "current_date::VARCHAR = key"}, "there is no column current_date"),
    ({"where": "pg_postmaster_start_time()::VARCHAR = key"}, "which depends on current_timestamp"),
    ({"where": "age(TIMESTAMP '2000-01-01') > INTERVAL 1 DAY AND width > 1"}, "has age, whose value does not depend"),
    ({"where": "ago(INTERVAL 1 DAY) > TIMESTAMP '2000-01-01' AND width > 1"}, "depends on current_timestamp"),
    ({"where": "width > #1"}, "has a positional reference"),
    ({"keep": {"top": 3, "by": "list_transform([width], lambda x: sum(x))[1]"}}, "has sum, an aggregate of several"),
    ({"keep": {"top": 3, "by": "list_transform([width], lambda x: y)[1]"}}, "there is no column y. It may name key"),
    ({"keep": {"top": 1.5, "by": "width"}}, "top: a share is at most 1, got 1.5; write a number of samples"),
    ({"keep": {"top": 0, "by": "width"}}, "rules.0.keep.top: Input should be greater than 0, got 0"),
    ({"keep": {"top": 2, "by": "width", "within": "uid"}}, "rules.0.keep.within: there is no column uid"),
    ({"sample": 3, "where": "width > 3"}, "a rule is one of where, keep, sample"),
    ({"deduplicate": {}}, "name a `teacher` for near duplicates, or set `exact: true`"),
    ({"deduplicate": {"teacher": "red", "exact": True}}, "name a `teacher` for near duplicates, or set"),
    ({"deduplicate": {"exact": True, "threshold": 0.9}}, "threshold: it is for near duplicates by a `teacher`"),
    ({"deduplicate": {"teacher": "pink"}}, "no teacher 'pink' has embedded the images of this dataset. Those that"),
    ({"deduplicate": {"exact": True, "keep": "key"}}, "rules.0.deduplicate.keep: 'key' is VARCHAR, and must be a"),
]


def test_a_wrong_rule_is_one_error_before_anything_is_read(url: str) -> None:
    samples = {path: path.read_bytes() for path in Path(url, "samples").iterdir()}
    for path in samples:
        path.write_bytes(b"")
    for rule, message in WRONG:
        with pytest.raises(UserError) as raised:
            make_view(url, rule)
        assert message in str(raised.value)
    assert not Path(url, "views").exists()
    for path, content in samples.items():
        path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"an expression fails on a sample: .*'thing 0 of shard 0'.*[^.]\. Use try_cast"
    ):
        make_view(url, "CAST(caption AS INTEGER) > 1")


def test_an_expression_that_fails_on_a_later_shard_writes_no_rows(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "_CHUNK_SHARDS", 1)
    failing = "CASE WHEN key LIKE '002%' THEN CAST(caption AS INTEGER) ELSE 1 END > 0"
    for rules in ([failing], [{"keep": {"top": 50, "by": "width"}}, failing, {"deduplicate": {"exact": True}}]):
        with pytest.raises(UserError, match="an expression fails on a sample"):
            make_view(url, *rules, processes=1)
        assert not [*Path(url, "views/some").glob("rows-*")]
    view = make_view(url, failing.replace("CAST", "try_cast"), processes=1)
    assert [len(view), view.report[0]["null"]] == [(SHARDS - 1) * ROWS, ROWS]


def test_times_are_those_of_utc_wherever_a_selection_runs(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        make_view(url, "hour(to_timestamp(width)) = 0", processes=1)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert keys_of(url) == keys_of(url, None)


def test_a_view_of_layers_that_have_changed_is_refused(url: str) -> None:
    make_view(url, "scores.sizes.words > 1")
    manifest = Path(url, "dataset.json")
    content = manifest_to_change(url)
    content["layers"]["scores/match"]["fingerprint"] = "0" * 16
    manifest.write_text(json.dumps(content))
    assert reinforce.open(url, teachers=[], captioners=[]).manifest, "another layer does not matter"
    content["layers"]["scores/sizes"]["fingerprint"] = "1" * 16
    manifest.write_text(json.dumps(content))
    with pytest.raises(UserError, match="scores/sizes has changed since view some was made"):
        reinforce.open(url, view="some")


def test_a_layer_that_lacks_a_shard_is_named(url: str) -> None:
    next(Path(url, "scores/sizes").iterdir()).unlink()
    with pytest.raises(UserError, match=r"scores/sizes lacks 1 of 3 shards.* Finish the run before you select"):
        make_view(url, "scores.sizes.words > 1")
    make_view(url, "scores.match.caption_mean > 0")


def test_shards_that_are_newer_than_a_view_are_counted_and_not_read(url: str, caplog: pytest.LogCaptureFixture) -> None:
    [first, *_] = sorted(Path(url, "samples").iterdir())
    hidden = Path(url).parent / "hidden"
    for path in [*Path(url).rglob(first.name)]:
        target = hidden / path.relative_to(url)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)
    shutil.rmtree(Path(url, "index"))
    make_view(url, "width > 0")
    shutil.copytree(hidden, url, dirs_exist_ok=True)
    assert len(keys_of(url)) == (SHARDS - 1) * ROWS
    assert "not read, because newer than view some: 1 shard" in caplog.text


def test_show_and_rows_find_the_samples_of_a_view_alone(url: str) -> None:
    some = keys_of(url, None)[1::2]
    make_view(url, f"key IN ({', '.join(map(repr, some))})")
    data = reinforce.open(url, view="some")
    assert data.show(some[3]).key == some[3]
    assert [sample.key for sample in data.rows(data.shards[0], 0, [0, 1])] == some[:2]
    with pytest.raises(KeyError, match="has no sample '00000000'"):
        data.show("00000000")


def test_a_process_that_is_forked_after_a_selection_lives_and_selects(url: str) -> None:
    make_view(url, "width > 0")
    child = multiprocessing.get_context("fork").Process(target=make_view, args=(url, "scores.sizes.words > 1"))
    child.start()
    child.join(60)
    child.kill()  # in case it waits for threads that it lacks
    assert child.exitcode == 0


def test_the_command_says_what_each_rule_took(url: str, tmp_path: Path, command: Command) -> None:
    rules = [{"where": "scores.match.caption_mean > -9"}, {"keep": {"top": 10, "by": "scores.match.caption_mean"}}]
    config = tmp_path / "select.yaml"
    config.write_text(yaml.safe_dump({"dataset": "elsewhere", "name": "best", "rules": rules}))
    with pytest.raises(UserError, match=r"has no view 'best'; it has: none\. `reinforce select` makes one"):
        reinforce.open(url, view="best")
    status, out, _ = command("select", str(config), "--set", f"dataset={url}")
    lines = out.splitlines()
    assert status == 0
    assert lines[0] == "1 where: 3 of 60 samples are left out, of which 3 have no value"
    assert lines[1].startswith("2 keep: 47 of 57 samples are left out; keeps values of at least ")
    assert lines[2] == "view best: 10 of 60 samples are kept"
    assert "view: best" in repr(reinforce.open(url, view="best"))


def test_rows_of_a_view_are_refused_where_the_samples_got_other_keys_while_it_is_open(url: str) -> None:
    """The digests of the view's rows are compared when it is opened; keys with each row group that is read."""
    make_view(url, "width > 0")
    data = reinforce.open(url, view="some", teachers=[], captioners=[])
    path = sorted(Path(url, "samples").iterdir())[0]
    column = pq.read_schema(path).get_field_index("key")
    rewrite(path, lambda table: table.set_column(column, "key", table["key"].take(np.arange(ROWS)[::-1])))
    with pytest.raises(UserError, match=r"view some is of other samples of .*\. Make it again"):
        list(data)


def test_samples_of_a_group_are_drawn_together_and_a_large_group_never(url: str) -> None:
    [first, second, third] = (shard for shard in reinforce.open(url).shards)
    pairs = [[f"{first}/000000{n:02}", f"{second}/001000{n:02}"] for n in range(6)]
    large = [f"{third}/002000{n:02}" for n in range(8)]
    for seed in range(4):
        drawn = {"count": 14, "together": [*pairs, large]}
        make_view(url, {"sample": drawn}, name="some", seed=seed)
        make_view(url, {"all_but": drawn}, name="others", seed=seed)
        some, others = {*keys_of(url)}, {*keys_of(url, "others")}
        assert (some & others, some | others) == (set(), {*keys_of(url, None)})
        assert 14 <= len(some) <= 15
        names = [{name.partition("/")[2] for name in group} for group in pairs]
        assert all(len(group & some) in (0, 2) for group in names)
        assert not some & {name.partition("/")[2] for name in large}
