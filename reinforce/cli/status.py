"""Commands that show datasets and runs: ``reinforce status`` and ``dashboard``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live

from reinforce.cli.common import DatasetUrl, print_json, print_lines
from reinforce.errors import UserError
from reinforce.terminal import escape, plural, print_table
from teachers.fast_paths.usage import parse, usage_lines

if TYPE_CHECKING:
    from reinforce.dataset.files.store import Store
    from reinforce.dataset.runs.progress import RunProgress

_LINE_SECONDS = 10.0  # between two lines of --watch that is not on a terminal
_FIRST_SECONDS = 60.0  # for the first news of a run that has begun


def status(
    dataset: DatasetUrl,
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
) -> None:
    """Show the running job, the layers of a dataset, what is quarantined and why, and how the last run ended.

    Reads only the dataset, so it works on any machine that reaches it, with or without Ray.
    """
    from reinforce.dataset.files.store import Store

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


def dashboard(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="[FOLDER]", help="Folder of Grafana's dashboards. Default: Ray's, on this machine."),
    ] = None,
) -> None:
    """Write the Grafana dashboard of runs into the folder from which Grafana provisions its dashboards."""
    from reinforce.engine.record.metrics import write_dashboard

    typer.echo(escape(f"written: {write_dashboard(folder)}"))


def _show(store: Store, reasons: bool, as_json: bool, verbose: bool) -> None:
    """Print the status once."""
    from reinforce.dataset.files.store import MANIFEST
    from reinforce.dataset.runs.progress import list_runs, running
    from reinforce.dataset.status import read_status

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
    from reinforce.dataset.runs.progress import list_runs, read_summary

    runs = list_runs(store)
    if not runs:
        raise UserError(f"no run has begun in {store.url}.")
    shown = _shown_as_json if as_json else _shown_in_place if Console().is_terminal else _shown_as_lines
    for progress in shown(_reports(store, runs[0])):
        if progress.silent_for() is not None:
            from reinforce.dataset.runs.progress import state_line

            raise UserError(state_line(progress))
    return read_summary(store, runs[0]) or {}


def _reports(store: Store, run: str) -> Iterator[RunProgress]:
    """The reports of a run until it ends."""
    from reinforce.dataset.runs.progress import read_progress, read_summary

    begun, seen = time.monotonic(), 0.0
    while read_summary(store, run) is None:
        progress = read_progress(store, run)
        if progress is None:
            if time.monotonic() - begun > _FIRST_SECONDS:
                raise UserError(f"run {run} does not report its progress: it has ended, or is of an earlier version.")
        elif progress.time != seen or progress.silent_for() is not None:
            seen = progress.time
            yield progress
        time.sleep(1.0 if progress is None else min(10.0, max(1.0, progress.interval / 2)))


def _shown_as_json(reports: Iterator[RunProgress]) -> Iterator[RunProgress]:
    for progress in reports:
        print_json(_run_as_json(progress), indent=None)
        yield progress


def _shown_as_lines(reports: Iterator[RunProgress]) -> Iterator[RunProgress]:
    from reinforce.dataset.runs.progress import headline

    printed = float("-inf")
    for progress in reports:
        if time.monotonic() - printed >= _LINE_SECONDS:
            printed = time.monotonic()
            typer.echo(headline(progress))
        yield progress


def _shown_in_place(reports: Iterator[RunProgress]) -> Iterator[RunProgress]:
    with Live(console=Console(), auto_refresh=False, transient=True, vertical_overflow="crop") as live:
        for progress in reports:
            live.update(_run_group(progress), refresh=True)
            yield progress


def _run_group(progress: RunProgress, verbose: bool = False) -> Group:
    from rich.text import Text

    from reinforce.dataset.runs.progress import detail_lines, headline, state_line, workers_table

    lines = [Text(line) for line in (state_line(progress), headline(progress))]
    details = [*detail_lines(progress), *(map(escape, usage_lines(progress.fast_paths)) if verbose else ())]
    return Group(*lines, workers_table(progress), *map(Text, details))


def _print_dataset(found: Mapping[str, Any], reasons: bool, verbose: bool) -> None:
    from reinforce.dataset.files.damage import describe_damaged
    from reinforce.dataset.status import quarantine_lines, status_table
    from reinforce.engine.record.rates import rate_lines
    from reinforce.engine.record.summary import cleaned_lines, not_in_source_lines, source_lines

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
