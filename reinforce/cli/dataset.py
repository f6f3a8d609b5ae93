"""Commands about a dataset that exists: ``reinforce status``, ``validate``, ``drop``, ``inspect`` and others."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live

from reinforce.cli.common import (
    Address,
    DatasetUrl,
    ImagesFrom,
    NoRay,
    ViewName,
    print_json,
    print_lines,
    split_names,
)
from reinforce.errors import UserError
from reinforce.terminal import escape, plural, print_table
from teachers.fast_paths.usage import parse, usage_lines
from teachers.redact import redact

if TYPE_CHECKING:
    from reinforce.dataset.runs import RunProgress
    from reinforce.dataset.store import Store

_LINE_SECONDS = 10.0  # between two lines of --watch that is not on a terminal
_FIRST_SECONDS = 60.0  # for the first news of a run that has begun


def status(
    dataset: Annotated[
        str | None, typer.Argument(metavar="DATASET", help="Folder or fsspec URI of a reinforced dataset.")
    ] = None,
    reasons: Annotated[
        bool, typer.Option("--reasons", help="Also show the first shard, key and detail of each reason of quarantine.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Follow the running job until it ends; exits with its status.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object; with --watch, one in a line for each report.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Also show the speed of each layer in the last run, and its fast paths."),
    ] = False,
    grafana: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Instead, write the Grafana dashboard of runs into a folder that Grafana provisions dashboards from; "
            "`ray`: into Ray's on this machine.",
        ),
    ] = None,
) -> None:
    """Show the running job, the layers of a dataset, what is quarantined and why, and how the last run ended.

    Reads only the dataset, so it works on any machine that reaches it, with or without Ray.
    """
    from reinforce.dataset.store import Store

    if grafana is not None:
        from reinforce.engine.record import write_dashboard

        if dataset or reasons or watch or as_json or verbose:
            raise UserError("--grafana writes the dashboard alone: leave out DATASET and the other options.")
        print_lines([f"written: {write_dashboard(None if grafana == Path('ray') else grafana)}"])
        return
    if dataset is None:
        raise UserError("name the dataset: reinforce status DATASET.")
    store = Store(dataset)
    if not watch:
        _show(store, reasons, as_json, verbose)
        return
    try:
        summary = _follow(store, as_json)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if not as_json:
        _show(store, reasons, as_json, verbose)
    raise typer.Exit(int(summary.get("status", 0)))


def _show(store: Store, reasons: bool, as_json: bool, verbose: bool) -> None:
    """Print the status once."""
    from reinforce.dataset.runs import list_runs, running
    from reinforce.dataset.status import read_status
    from reinforce.dataset.store import MANIFEST

    progress = running(store, list_runs(store))
    begun = progress is not None and not store.fs.exists(store.path(MANIFEST))  # no model is loaded yet
    if as_json:
        found = {} if begun else read_status(store.url)
        print_json(_as_json(store.url, progress, found))
        return
    if progress is not None:
        print_table(_run_group(progress, verbose))
    if begun:
        typer.echo("there are no layers yet: workers load their models")
    else:
        _print_dataset(read_status(store.url), reasons, verbose)


def _as_json(url: str, progress: RunProgress | None, found: Mapping[str, Any]) -> dict[str, Any]:
    """The object that docs/command-line.md describes."""
    return {
        "url": url,
        "run": None if progress is None else _run_as_json(progress),
        "shards": found.get("samples", 0),
        "layers": found.get("layers", {}),
        "quarantine": found.get("quarantine", {}),
        "quarantined": found.get("quarantined", {}),
        "damaged": [asdict(file) for file in found.get("damaged", ())],
        "missing": found.get("lost") or None,
        "notes": found.get("notes", []),
        "last_run": found.get("last_run"),
        "views": [asdict(view) for view in found.get("views", ())],
    }


def _run_as_json(progress: RunProgress) -> dict[str, Any]:
    silent = progress.silent_for()
    state = "running" if silent is None else "silent"
    return {"state": state, **progress.model_dump(mode="json"), "log_command": progress.log_command() or None}


def _follow(store: Store, as_json: bool) -> dict[str, Any]:
    """Show the latest run until it has ended; returns its summary. Raises UserError if it does not report."""
    from reinforce.dataset.runs import headline, list_runs, read_summary, state_line

    runs = list_runs(store)
    if not runs:
        raise UserError(f"no run has begun in {store.url}.")
    live, printed = None, float("-inf")
    if not as_json and Console().is_terminal:
        live = Live(console=Console(), auto_refresh=False, transient=True, vertical_overflow="crop")
    with live or contextlib.nullcontext():
        for progress in _reports(store, runs[0]):
            if as_json:
                print_json(_run_as_json(progress), indent=None)
            elif live is not None:
                live.update(_run_group(progress), refresh=True)
            elif time.monotonic() - printed >= _LINE_SECONDS:
                printed = time.monotonic()
                typer.echo(headline(progress))
            if progress.silent_for() is not None:
                raise UserError(state_line(progress))
    return read_summary(store, runs[0]) or {}


def _reports(store: Store, run: str) -> Iterator[RunProgress]:
    """The reports of a run until it ends."""
    from reinforce.dataset.runs import read_progress, read_summary

    begun, seen = time.monotonic(), 0.0
    while read_summary(store, run) is None:
        progress = read_progress(store, run)
        if progress is None:
            if time.monotonic() - begun > _FIRST_SECONDS:
                raise UserError(f"run {run} does not report its progress: it has ended.")
        elif progress.time != seen or progress.silent_for() is not None:
            seen = progress.time
            yield progress
        time.sleep(1.0 if progress is None else min(10.0, max(1.0, progress.interval / 2)))


def _run_group(progress: RunProgress, verbose: bool = False) -> Group:
    from rich.text import Text

    from reinforce.dataset.runs import detail_lines, headline, state_line, workers_table

    lines = [Text(line) for line in (state_line(progress), headline(progress))]
    details = [*detail_lines(progress), *(map(escape, usage_lines(progress.fast_paths)) if verbose else ())]
    return Group(*lines, workers_table(progress), *map(Text, details))


def _print_dataset(found: Mapping[str, Any], reasons: bool, verbose: bool) -> None:
    from reinforce.dataset.index import describe_damaged
    from reinforce.dataset.status import quarantine_lines, status_table
    from reinforce.engine.rates import rate_lines
    from reinforce.engine.record import cleaned_lines, not_in_source_lines, source_lines

    print_table(status_table(dict(found)))
    if damage := describe_damaged(found["url"], found["damaged"]):
        typer.echo(escape(damage))
    if found["lost"]:
        typer.echo(escape(f"{found['lost']}. `reinforce run` with the dataset's config computes what is missing."))
    print_lines([*found["notes"], *(view.line() for view in found["views"])])
    print_lines(quarantine_lines(dict(found), reasons))
    if found["quarantine"] and not reasons:
        typer.echo(escape(f"`reinforce status {found['url']} --reasons` shows an example of each reason"))
    if last := found["last_run"]:
        shards, seconds = last.get("shards", 0), last.get("seconds", 0)
        text = f"last run {last.get('run')}: {plural(shards, 'shard')} in {seconds:.0f} s, {last.get('message')}"
        typer.echo(escape(text))
        lines = [*source_lines(last.get("source_counts", {})), *cleaned_lines(last.get("cleaned", {}))]
        lines += not_in_source_lines(last.get("not_in_source", {}))
        lines += usage_lines(parse(last.get("fast_paths", ()))) if verbose else []
        print_lines([*rate_lines(last, verbose), *lines, *map(str, last.get("notes", []))])


Names = Annotated[str | None, typer.Option(metavar="NAMES", help="Names, separated by commas. Default: all.")]


def validate(
    dataset: DatasetUrl,
    sources: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder or URL of source files, repeatable: have they changed since their samples were written?",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Read only the keys: damage elsewhere is not found.")] = False,
    count: Annotated[
        bool,
        typer.Option("--count", help="Count the samples in the files of --sources: all of a tar or jsonl is read."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with all problems.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Move files that are at fault to set-aside/: the next run computes them.")
    ] = False,
    recompute: Annotated[
        int | None, typer.Option(metavar="ROWS", min=1, help="Compute random rows again with the models of --config.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML config of the dataset, for --recompute.")] = None,
    sample: Annotated[
        int | None,
        typer.Option(metavar="SHARDS", min=1, help="Read only so many random shards; all are listed."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Which shards --sample and which rows --recompute take.")] = 0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that read. Default: by the cores and the dataset's size.")
    ] = None,
) -> None:
    """Read all of a dataset: damaged, misplaced and missing files, wrong rows, repeated keys, changed sources.

    --sample reads random shards; missing and stray files, files of another size and dataset.json are checked of all.

    --repair moves samples only if their source file is in a folder of --sources and has not changed.

    Exits with status 0 if the dataset is valid, 1 if something was found, 2 if it cannot be read.
    """
    from reinforce.dataset.validate import repair as repair_dataset
    from reinforce.dataset.validate import validate as validate_dataset

    if recompute and config is None:
        raise UserError("--recompute needs --config: the config of the dataset names the models.")
    if count and not sources:
        raise UserError("--count needs --sources: the folders of the source files.")
    found = validate_dataset(dataset, sources or (), quick, count, sample, seed, workers)
    again = None
    if recompute and config:
        from reinforce.config import load_config
        from reinforce.engine.recompute import recompute as compute

        again = compute(load_config(config), dataset, recompute, seed)
    found.findings += again.findings() if again else ()
    repaired = repair_dataset(dataset, found.findings, sources or ()) if repair else None
    if as_json:
        parts = {"recomputed": again, "repair": repaired}
        report = {**found.as_json(), **{name: part.as_json() for name, part in parts.items() if part is not None}}
        typer.echo(json.dumps(report, indent=2))
    else:
        for line in [*(again.lines() if again else ()), *found.lines(), *(repaired.lines() if repaired else ())]:
            typer.echo(escape(redact(line)))
    raise typer.Exit(0 if found.valid else 1)


def drop(
    dataset: DatasetUrl,
    layers: Annotated[
        list[str],
        typer.Argument(metavar="LAYER...", help="Names as in `reinforce status`, or patterns: 'embeddings/dfn2b/*'."),
    ],
    shard: Annotated[
        str | None, typer.Option(metavar="NAME", help="Move only the files of this shard to set-aside/.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete. Without it, only show what would be deleted.")] = False,
) -> None:
    """Delete layers: their files, their quarantine and their entries in dataset.json. And views: 'views/best'.

    With --shard, set aside one file of each layer, for example a damaged one, so that a run computes it again.

    Layers that depend on a deleted one must be named, too. All depend on `samples`: '*' deletes everything. Views that
    were made from a deleted layer stay, and are refused until a run computes the same again.

    Do not use it while a run writes to the dataset; only a local dataset is locked.
    """
    from reinforce.dataset import drop as dropping
    from reinforce.dataset.store import Store

    store = Store(dataset)
    if shard is not None:
        _drop_shard(store, layers, shard, yes)
        return
    plan = dropping.plan_drop(store, layers)
    print_lines(plan.lines())
    plan.check()
    if not yes:
        typer.echo(escape(f"nothing was deleted; to delete: {plan.command()} --yes"))
        return
    try:
        dropping.drop(store, plan)
    except KeyboardInterrupt:
        typer.echo("stopped; run the same command again to delete the rest", err=True)
        raise typer.Exit(130) from None
    typer.echo("deleted")


def _drop_shard(store: Store, patterns: list[str], shard: str, yes: bool) -> None:
    """Set aside the files of a shard, or show which they are."""
    from reinforce.dataset import drop as dropping
    from reinforce.dataset.index import drop_shard_command

    layers = dropping.layers_with_shard(store, patterns, shard)
    if yes:
        for path in dropping.drop_shard(store, layers, shard):
            typer.echo(escape(f"moved to {path}"))
        typer.echo("`reinforce run` with the dataset's config computes what is missing")
        return
    for layer in layers:
        typer.echo(escape(f"{store.layer_path(layer, shard)}"))
    command = drop_shard_command(store.url, layers, shard)
    typer.echo(escape(f"nothing was moved; to move to set-aside/: {command} --yes"))


def convert(
    dataset: DatasetUrl,
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="Whose vectors, stored in float16 or float32.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the teacher that gets the converted vectors.")],
    codec: Annotated[str, typer.Option(help="float16-int8, first256, pca128, pq96, rq32 and others.")],
    sample: Annotated[int, typer.Option(min=1, help="Vectors to which codebooks are fitted.")] = 32_768,
    address: Address = None,
    no_ray: NoRay = False,
) -> None:
    """Store the vectors of a teacher again in another codec, from those that are stored: no model is loaded.

    They are those of a teacher of another name in the same dataset, as a run with that codec would write them. Delete
    the others with `reinforce drop` when you do not need them.

    The same command continues one that was stopped. Do not use it while a run writes to the dataset.
    """
    from reinforce.dataset.convert import convert as convert_vectors

    found = convert_vectors(dataset, teacher, name, codec, sample, use_ray=not no_ray, address=address)
    print_lines(found.lines())


def inspect(
    dataset: DatasetUrl,
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder or fsspec URI to write the report to.")],
    teachers: Names = None,
    captioners: Names = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of samples that are looked at.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Which row groups and samples are looked at.")] = 0,
    images_from: ImagesFrom = None,
    view: ViewName = None,
) -> None:
    """Write a report on a dataset: an HTML folder with a summary, a gallery of samples, figures of captions, and plots.

    It opens in a browser from disk, from a web server or from an object store, and sends no request elsewhere. An
    earlier report in OUTPUT is replaced. The same command gives equal files.

    With --view, it also shows samples on both sides of each rule of the view.
    """
    from reinforce.api.commands import inspect as inspect_dataset

    found = inspect_dataset(
        dataset, output, split_names(teachers), split_names(captioners), limit=limit, seed=seed,
        images_from=images_from, view=view,
    )  # fmt: skip
    print_lines(found.lines())


def select(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML config: the dataset, a name, and rules.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a key of the config, repeatable: --set dataset=demo/dataset"
        ),
    ] = None,
    address: Address = None,
) -> None:
    """Choose samples of a dataset by rules from what is stored of them, and write a view.

    A view names the samples that are kept, and why each of the others is left out. It copies nothing: reinforce.open
    reads the dataset through it.

    Works on a Ray cluster, or in a process for each core. The same command continues one that was stopped.
    """
    from reinforce.api.commands import select_config
    from reinforce.explore.config import load_config

    selected = select_config(load_config(config, overrides), lambda line: typer.echo(escape(line), err=True), address)
    for line in selected.text:
        typer.echo(escape(redact(line)))
