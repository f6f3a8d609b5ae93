"""Commands that train, tune and measure models: ``reinforce train``, ``evaluate``, ``tune`` and others."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from reinforce.cli.common import (
    STDOUT,
    Address,
    AsJson,
    JsonFile,
    Limit,
    Overrides,
    Pretrained,
    Retrieval,
    SetsConfig,
    ZeroShot,
    config_argument,
    only_json,
    print_lines,
    run_training,
    show_report,
    split_names,
)
from reinforce.errors import SetsMissing, UserError
from reinforce.evaluation.registry import Suite
from reinforce.processes.imports import no_garbage_collection
from reinforce.terminal import escape, first_names, print_table
from teachers.redact import redact

if TYPE_CHECKING:
    from reinforce.tuning.screening import SubsetScreening, TeacherScreening

T = TypeVar("T")


def train(
    config: Annotated[Path, config_argument("student-demo.yaml")],
    set_: Overrides = None,
    address: Address = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Trace three steps into the output; as --set train.profile=3.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a student from reinforced datasets, or resume from the last checkpoint in its output folder.

    One rank trains in this process, more ranks train on Ray Train. Under torchrun, the ranks are torchrun's.
    """
    from reinforce import settings
    from reinforce.evaluation.model_names import loading_call
    from reinforce.student.config import StudentConfig

    with only_json(as_json) as print_json:
        checked = settings.load(StudentConfig, config, [*(set_ or ()), "train.profile=3"] if profile else set_)
        checked.train.check_warmup(checked.train.steps)
        with no_garbage_collection():  # takes seconds, so the config is checked before
            from reinforce.student.train import train as train_student

        results = run_training(lambda: train_student(checked, address=address))
        if _is_first_rank() and as_json:
            print_json(results.as_json())
        elif _is_first_rank():
            typer.echo(results.summary())
            if not checked.student.images_alone:
                typer.echo(f"load it: {loading_call(results.output)}")


def finetune_captioner(
    config: Annotated[Path, config_argument("finetune-demo.yaml")],
    set_: Overrides = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a CoCa captioner on images with captions, or resume from the last checkpoint in its output folder.

    Runs where `train` would run. The result is a model for `captioners:` of `reinforce run`.
    """
    from reinforce import settings
    from reinforce.captioning.config import CaptionerConfig

    with only_json(as_json) as print_json:
        checked = settings.load(CaptionerConfig, config, set_)
        checked.train.check_warmup(checked.train.steps)
        with no_garbage_collection():
            from reinforce.captioning.finetune import finetune, format_comparison

        results = run_training(lambda: finetune(checked, address=address))
        if _is_first_rank() and as_json:
            print_json(results.as_json())
        elif _is_first_rank():
            typer.echo(results.summary())
            typer.echo("held-out images, before and after:")
            typer.echo(format_comparison(results))


def tune(
    config: Annotated[Path, config_argument("tune-demo.yaml")],
    set_: Overrides = None,
    address: Address = None,
    screen_only: Annotated[
        bool,
        typer.Option(
            "--screen-only", help="Only screen scales and subsets of teachers with stored embeddings; train nothing."
        ),
    ] = False,
    record: Annotated[
        bool, typer.Option("--record", help="Write the scales found into dataset.json of the datasets.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Find the teachers' logit scales and lambda by short training runs; finished trials are not repeated.

    Writes a table, a plot and a config for `reinforce train` to the output folder.
    """
    with no_garbage_collection():
        from reinforce.tuning import command
    from reinforce import settings
    from reinforce.tuning.config import TuneConfig
    from reinforce.tuning.results import results_table
    from reinforce.tuning.screening import screening_json

    with only_json(as_json) as print_json:
        checked = settings.load(TuneConfig, config, set_)
        if screen_only and record:
            raise UserError(
                "--record writes the scales that trials found, and --screen-only trains none: leave one of them out. "
                "To use a screened scale, set logit_scale of its teacher in the run's config."
            )
        if screen_only:
            screenings, subsets = run_training(lambda: command.screen_only(checked))
            if as_json:
                print_json(screening_json(screenings, subsets))
                return
            _print_screening(screenings, subsets)
            typer.echo(f"plot: {redact(checked.output)}/{command.PLOT}")
            return
        result = run_training(lambda: command.tune(checked, address=address))
        recorded = command.record_scales_in_datasets(checked, result) if record and not result.errors else []
        if as_json:
            print_json({"output": result.output, **result.json(), "errors": result.errors, "recorded": recorded})
        else:
            _print_screening(result.screenings, result.subsets)
            print_table(results_table(result.rows, result.metric))
            print_lines([*result.lines(), *recorded])
    if result.errors:
        raise UserError("trials failed; the same command retries them:\n  " + "\n  ".join(result.errors))


def _print_screening(screenings: Mapping[str, TeacherScreening], subsets: SubsetScreening) -> None:
    from reinforce.tuning.results import screening_lines, screening_table, subsets_lines, subsets_table

    print_table(screening_table(screenings))
    print_lines(screening_lines(screenings))
    if subsets.subsets:
        print_table(subsets_table(subsets))
    print_lines(subsets_lines(subsets))


def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...",
            help="NAME,TAG of open_clip (or NAME with --pretrained), local-dir:PATH, hf-hub:ORG/REPO, a folder or "
            "URL that a training wrote, or any teacher: FAMILY:MODEL, class:package.module:Class, or RUN.yaml:TEACHER.",
        ),
    ] = None,
    pretrained: Pretrained = None,
    config: SetsConfig = None,
    zero_shot: ZeroShot = None,
    retrieval: Retrieval = None,
    limit: Limit = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Set a key of `evaluate`, also of a set: --set zero_shot.NAME.classes=imagenet, "
            "--set probes.NAME.train.images=URL; repeatable.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0 or mps.")] = "auto",
    precision: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Precision of the forward pass.")] = "fp32",
    json_: JsonFile = None,
    page: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="HTML page with segmentations of sets with masks, of all models side by side."
        ),
    ] = None,
    suite: Annotated[
        Suite | None,
        typer.Option(help="Instead of sets of your own, the published sets of a suite."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="ROOT", help="Folder or URL with the sets of --suite; hf:// reads them where published."),
    ] = None,
    sets_: Annotated[
        list[str] | None, typer.Option("--sets", metavar="KEY,...", help="Sets of --suite by key. Default: all.")
    ] = None,
    out: Annotated[
        str, typer.Option(metavar="FOLDER", help="Where --suite keeps results; finished sets are not repeated.")
    ] = "evaluation",
    compare: Annotated[
        str | None, typer.Option(metavar="NAME", help="Show the published metrics of a model, such as mobileclip2_s0.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes for sets of --suite side by side. Default: one for each accelerator."),
    ] = None,
    address: Address = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Of --suite: sets that are not below ROOT are no error.")
    ] = False,
    fetch: Annotated[
        bool,
        typer.Option(
            "--fetch",
            help="First download the sets of --suite from the Hub to --data, or continue; without MODEL, that alone.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Of --fetch: only print the bytes and the revision of each set.")
    ] = False,
) -> None:
    """Evaluate models by zero-shot classification, retrieval, nearest neighbours, linear probes and segmentation.

    Each model gets its own preprocessing. Images that cannot be decoded are skipped and reported.

    --fetch keeps complete files, and revisions.json in ROOT records the revision of each set. HF_TOKEN is used if set.
    """
    from reinforce.api.commands import evaluate_sets
    from reinforce.evaluation.command import build_evaluation

    own = {"config": config, "zero-shot": zero_shot, "retrieval": retrieval, "limit": limit, "page": page}
    if suite is None and (data or sets_ or compare or workers or address or allow_missing or fetch):
        raise UserError(
            "--data, --sets, --compare, --workers, --address, --allow-missing and --fetch belong to --suite, and none "
            "is given."
        )
    if suite is not None and (options := [f"--{name}" for name, value in own.items() if value]):
        raise UserError(f"{', '.join(options)}: not with --suite, whose sets and templates are published.")
    if suite is not None and data is None:
        raise UserError(f"--suite {suite}: name the folder or URL of its sets with --data, or --data hf://")
    if dry_run and (models or not fetch):
        raise UserError("--dry-run belongs to --fetch, without MODEL: it prints what would be downloaded.")
    keys = split_names(",".join(sets_ or ()))
    if fetch and suite is not None and data is not None:
        from reinforce.evaluation.suite import fetch_sets

        if "://" in data:
            raise UserError(f"--fetch downloads to a folder of this machine, and --data is {redact(data)}.")
        fetch_sets(
            suite, Path(data), keys or (), dry_run=dry_run, log=lambda line: typer.echo(escape(line), err=bool(models))
        )
        if not models:
            return
    if not models:
        raise UserError("name one or more models; `reinforce evaluate --help` shows how.")
    published = {"suite": suite, "data": data, "sets": keys or None} if suite is not None else None
    evaluation = build_evaluation(config, zero_shot or (), retrieval or (), limit, set_ or (), published)
    if not evaluation.metrics:
        raise UserError("nothing to evaluate on: name sets with --zero-shot, --retrieval, --config, --set or --suite.")
    with only_json(json_ == STDOUT) as print_json:
        report = evaluate_sets(models, evaluation, pretrained, device, precision, out, compare, workers, address, page)
        show_report(report, json_, print_json)
    if report.failed:
        raise UserError(f"sets failed: {', '.join(report.failed)}. The same command tries them again.")
    if report.absent and not allow_missing:
        raise SetsMissing(
            f"{len(report.absent)} of {len(evaluation.suite_sets)} sets are missing: {first_names([*report.absent])}. "
            "Copy them below --data, choose others with --sets, or add --allow-missing."
        )


def _is_first_rank() -> bool:
    """Return whether this process is torchrun's rank 0, or was not started by torchrun."""
    return os.environ.get("RANK", "0") == "0"
