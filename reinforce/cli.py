"""The command line: ``reinforce run``, ``plan``, ``status``, ``train``, ``evaluate``, ``export onnx`` and others."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console

from reinforce import cli_dataset, cli_export
from reinforce.config import load_config
from reinforce.cores import let_waiting_threads_sleep
from reinforce.errors import UserError
from reinforce.terminal import escape
from teachers.redact import redact

T = TypeVar("T")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Multi-modal dataset reinforcement: store augmentations, teachers' embeddings and synthetic captions next to "
    "image-text pairs, and train small CLIP students from them.",
)
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the config, repeatable: --set workers.cpus=4"),
]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster to use: 'auto' or HOST:PORT. Default: RAY_ADDRESS, otherwise this machine."),
]
JsonFile = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Also write the results to this file.")]


def _config_argument(example: str) -> Any:
    return typer.Argument(metavar="CONFIG", help=f"YAML config, for example configs/{example}.")


@app.command()
def run(
    config: Annotated[Path, _config_argument("demo.yaml")],
    set_: Overrides = None,
    address: Address = None,
    retry_quarantined: Annotated[
        bool, typer.Option("--retry-quarantined", help="Retry the shards that are quarantined as a whole.")
    ] = False,
) -> None:
    """Compute the missing layers of a dataset, and nothing else.

    Starting, resuming after a crash and adding a teacher are the same command.

    Exits with status 0 if every shard is finished or, up to failures.allowed_share of the shards, quarantined.
    """
    from reinforce.engine.runner import run as run_config

    checked = load_config(config, set_)
    try:
        summary = run_config(checked, address=address, retry_quarantined=retry_quarantined)
    except KeyboardInterrupt:
        typer.echo("stopped; finished shards are kept. Run the same command again to resume.", err=True)
        raise typer.Exit(130) from None
    typer.echo(escape(summary.text(checked.output)))
    raise typer.Exit(summary.status)


@app.command()
def plan(
    config: Annotated[Path, _config_argument("demo.yaml")],
    set_: Overrides = None,
    uses: Annotated[bool, typer.Option("--uses", help="Only name the classes and hosts that it would use.")] = False,
) -> None:
    """Show what is missing in each layer and how large it will be. Starts nothing and writes nothing.

    Reads one sample of the source, and fails where a run would fail before it starts. Custom classes are imported.
    """
    from reinforce.dataset.damage import describe_damaged
    from reinforce.dataset.store import Store
    from reinforce.engine.estimate import expected_bytes, plan_table
    from reinforce.engine.plan import make_plan
    from reinforce.engine.probe import check_source
    from reinforce.engine.sources import check_copies
    from reinforce.engine.summary import not_in_source_lines
    from reinforce.engine.uses import config_uses
    from reinforce.terminal import format_bytes

    checked = load_config(config, set_)
    for line in config_uses(checked).lines(every=uses):
        typer.echo(escape(redact(line)))
    if uses:
        return
    current = make_plan(checked)
    expected = expected_bytes(current)
    Console().print(plan_table(current, expected))
    total = sum(size or 0 for size in expected.values())
    size = format_bytes(total) if None not in expected.values() else f"{format_bytes(total)} or more"
    typer.echo(f"{current.shards:,} shards, {len(current.pending):,} with something missing, about {size} to write")
    damage = describe_damaged(Store(checked.output).url, current.damaged)
    for line in filter(None, [*current.notes, damage, *not_in_source_lines(asdict(current.not_in_source))]):
        typer.echo(escape(line))
    sample, notes = check_source(current)
    if sample is not None:
        typer.echo(escape(sample.line()))
    for note in notes:
        typer.echo(escape(redact(note)), err=True)
    check_copies(current, Store(current.config.output))


@app.command()
def check(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="YAML config of a run, or a class as module:Class.")],
    set_: Overrides = None,
    options: Annotated[
        str | None, typer.Option(metavar="JSON", help="Keyword arguments of the class: '{\"width\": 32}'.")
    ] = None,
    kind: Annotated[
        Literal["teacher", "captioner"] | None, typer.Option(help="What the class is. Default: by its methods.")
    ] = None,
) -> None:
    """Load teachers and captioners, test them on small batches as before a run, and measure their speed.

    Starts nothing and writes nothing. Exits with status 2 if a model fails.
    """
    from reinforce.engine.check import check_target

    report = check_target(target, options, kind, set_)
    if report.rows:
        Console().print(report.table())
    for note in report.notes:
        typer.echo(escape(note))
    if report.errors:
        raise UserError("\n".join(report.errors))


app.command()(cli_dataset.status)
app.command()(cli_dataset.validate)
app.command()(cli_dataset.drop)
app.command()(cli_export.card)
app.add_typer(cli_export.export, name="export")


@app.command()
def train(
    config: Annotated[Path, _config_argument("student-demo.yaml")],
    set_: Overrides = None,
    address: Address = None,
) -> None:
    """Train a student from reinforced datasets, or resume from the last checkpoint in its output folder.

    One rank trains in this process, more ranks train on Ray Train. Under torchrun, the ranks are torchrun's.
    """
    from reinforce.student.config import load_student_config
    from reinforce.student.train import train as train_student

    checked = load_student_config(config, set_)
    results = _run_training(lambda: train_student(checked, address=address))
    if _is_first_rank():
        typer.echo(results.summary())


@app.command("finetune-captioner")
def finetune_captioner(
    config: Annotated[Path, _config_argument("finetune-demo.yaml")], set_: Overrides = None, address: Address = None
) -> None:
    """Fine-tune a CoCa captioner on images with captions, or resume from the last checkpoint in its output folder.

    Runs where `train` would run. The result is a model for `captioners:` of `reinforce run`.
    """
    from reinforce.captioning.config import load_captioner_config
    from reinforce.captioning.finetune import finetune, format_comparison

    checked = load_captioner_config(config, set_)
    results = _run_training(lambda: finetune(checked, address=address))
    if _is_first_rank():
        typer.echo(results.summary())
        typer.echo("held-out images, before and after:")
        typer.echo(format_comparison(results))


@app.command()
def tune(
    config: Annotated[Path, _config_argument("tune-demo.yaml")],
    set_: Overrides = None,
    address: Address = None,
    screen_only: Annotated[
        bool, typer.Option("--screen-only", help="Only screen the logit scales with stored embeddings; train nothing.")
    ] = False,
    record: Annotated[
        bool, typer.Option("--record", help="Write the scales found into dataset.json of the datasets.")
    ] = False,
) -> None:
    """Find the teachers' logit scales and lambda by short trainings; finished trials are not repeated.

    Writes a table, a plot and a config for `reinforce train` to the output folder.
    """
    from reinforce.tuning import command
    from reinforce.tuning.config import load_tune_config
    from reinforce.tuning.tables import results_table, screening_table

    checked = load_tune_config(config, set_)
    if screen_only:
        screenings = _run_training(lambda: command.screen_only(checked))
        Console().print(screening_table(screenings))
        typer.echo(f"plot: {redact(checked.output)}/{command.PLOT}")
        return
    result = _run_training(lambda: command.tune(checked, address=address))
    Console().print(screening_table(result.screenings))
    Console().print(results_table(result.rows, result.metric))
    lines = result.lines()
    if record and not result.errors:
        lines += command.record_scales_in_datasets(checked, result)
    for line in lines:
        typer.echo(escape(line))
    if result.errors:
        raise UserError("trials failed; the same command retries them:\n  " + "\n  ".join(result.errors))


@app.command()
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="NAME,TAG of open_clip (or NAME with --pretrained), local-dir:PATH, hf-hub:ORG/REPO, or a folder or "
            "URL that a training wrote.",
        ),
    ],
    pretrained: Annotated[
        str | None, typer.Option(metavar="TAG", help="Tag or checkpoint of the models given by NAME alone.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML config whose `evaluate` section defines sets.")] = None,
    zero_shot: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=URL", help="Images with classes: a folder with a folder per class, or shards."),
    ] = None,
    retrieval: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=URL", help="Images with captions: shards, or a reinforced dataset."),
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="For --zero-shot: `imagenet` or a text file. Default: the names of the folders.")
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="For --zero-shot: where shards hold the class, `cls` or json:FIELD.")
    ] = None,
    templates: Annotated[
        str | None, typer.Option(help="For --zero-shot: `openai`, `simple` (default), `none`, or a text file.")
    ] = None,
    groups: Annotated[
        str | None, typer.Option(help="For --zero-shot: json:FIELD or a JSON file with the group of each class.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Number of images of each set of the command line. Default: all.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Images or texts per forward pass.")] = None,
    images_from: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="Folder of tars that a dataset may read by reference.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:0.")] = "auto",
    precision: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Precision of the forward pass.")] = "fp32",
    json_: JsonFile = None,
    clip_benchmark: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Also run the package clip_benchmark on datasets that it downloads to this folder.",
        ),
    ] = None,
) -> None:
    """Evaluate models by zero-shot classification and image-text retrieval.

    Each model gets its own preprocessing. Images that cannot be decoded are skipped and reported.
    """
    from reinforce.evaluation import command
    from reinforce.model_names import resolve_models

    common = {"classes": classes, "label": label, "templates": templates, "groups": groups}
    common = {key: value for key, value in common.items() if value is not None}
    sets = command.build_evaluation(config, zero_shot or [], retrieval or [], common, limit, batch, images_from or [])
    if not sets.metrics and clip_benchmark is None:
        raise UserError("nothing to evaluate on: name sets with --zero-shot, --retrieval or --config.")
    with resolve_models(models, pretrained) as specs:
        report = command.evaluate_models(specs, sets, device, precision, clip_benchmark)
    Console().print(report.table())
    for line in report.lines():
        typer.echo(line)
    if json_ is not None:
        report.write(json_)


@app.command()
def latency(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Names of open_clip, local-dir:PATH, or folders that trainings wrote."),
    ],
    rounds: Annotated[int, typer.Option(min=1, help="Measurements per tower; the towers take turns.")] = 20,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's, one per core.")] = None,
    clock: Annotated[
        Literal["wall", "process"],
        typer.Option(help="wall: elapsed time; process: CPU time of all threads, for a machine that is not idle."),
    ] = "wall",
    onnx_: Annotated[
        bool, typer.Option("--onnx", help="Also measure in onnxruntime; requires pip install -e '.\\[export]'.")
    ] = False,
    json_: JsonFile = None,
) -> None:
    """Compare parameters, operations and latency at batch size 1 of models, on the CPU of this machine.

    The architectures are measured with random weights, reparameterised as for export; nothing is downloaded.
    """
    from reinforce.model_names import resolve_models
    from reinforce.shipping.latency import measure_latency
    from reinforce.shipping.packages import require_export_packages

    if onnx_:
        require_export_packages()
    with resolve_models(models, weights=False) as specs:
        report = measure_latency(specs, rounds=rounds, threads=threads, onnx=onnx_, clock=clock)
    Console().print(report.table())
    typer.echo(report.conditions())
    if json_ is not None:
        report.write(json_)


app.command(name="captions-report")(cli_dataset.captions_report)


def _run_training(work: Callable[[], T]) -> T:
    """Run a training with its log on the terminal; if it is stopped, exit with the status of the signal."""
    from reinforce.training.stop import Stopped

    logging.basicConfig(format="%(message)s")
    logging.getLogger("reinforce").setLevel(logging.INFO)
    try:
        return work()
    except (Stopped, KeyboardInterrupt) as stopped:
        typer.echo("stopped; run the same command again to resume from the last checkpoint", err=True)
        raise typer.Exit(stopped.status if isinstance(stopped, Stopped) else 130) from None


def _is_first_rank() -> bool:
    """Return whether this process is torchrun's rank 0, or was not started by torchrun."""
    return os.environ.get("RANK", "0") == "0"


def main(arguments: list[str] | None = None) -> None:
    """Run a command. A user error prints one line and exits with its status."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # hides warnings of intended settings
    let_waiting_threads_sleep()
    try:
        app(args=arguments)
    except UserError as error:
        typer.echo(f"error: {escape(redact(str(error)))}", err=True)
        raise SystemExit(error.exit_status) from None
