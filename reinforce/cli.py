"""The command line: ``reinforce run``, ``plan``, ``status``, ``train``, ``evaluate``, ``export onnx`` and others."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer
from rich.console import Console

from reinforce.config import load_config
from reinforce.errors import UserError
from reinforce.terminal import escape
from teachers.redact import redact

T = TypeVar("T")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Multi-modal dataset reinforcement: teachers' embeddings and synthetic captions beside every image-text pair.",
)
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, for example configs/demo.yaml")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the config, e.g. --set workers.cpus=4"),
]


TrainingAddress = Annotated[
    str | None,
    typer.Option(help="Ray cluster to train on: 'auto' or HOST:PORT. Default: RAY_ADDRESS, else this machine."),
]


@app.command()
def run(
    config: ConfigPath,
    set_: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to use: 'auto' or HOST:PORT. Default: RAY_ADDRESS, else this machine."),
    ] = None,
    retry_quarantined: Annotated[
        bool, typer.Option("--retry-quarantined", help="Try the shards again that were given up as a whole.")
    ] = False,
) -> None:
    """Compute the layers that are missing, and nothing else.

    A fresh run, a resume after a crash and an added teacher are the same command.

    Exits 0 when every shard is finished, or quarantined within failures.allowed_share.
    """
    from reinforce.engine.runner import run as run_config

    checked = load_config(config, set_)
    try:
        summary = run_config(checked, address=address, retry_quarantined=retry_quarantined)
    except KeyboardInterrupt:
        typer.echo("stopped; what is finished is kept, run again to go on", err=True)
        raise typer.Exit(130) from None
    typer.echo(escape(summary.text(checked.output)))
    raise typer.Exit(summary.status)


@app.command()
def plan(config: ConfigPath, set_: Overrides = None) -> None:
    """Show what is missing, per layer, and how many bytes it will be. Starts and writes nothing."""
    from reinforce.engine.estimate import plan_table
    from reinforce.engine.plan import make_plan
    from reinforce.engine.runner import check_source
    from reinforce.terminal import format_bytes

    from reinforce.engine.estimate import expected_bytes  # isort: skip

    made = make_plan(load_config(config, set_))
    expected = expected_bytes(made)
    Console().print(plan_table(made, expected))
    total = sum(size or 0 for size in expected.values())
    size = format_bytes(total) if None not in expected.values() else f"{format_bytes(total)} or more"
    typer.echo(f"{made.shards:,} shards, {len(made.pending):,} with something missing, about {size} to write")
    if None in expected.values():
        try:
            check_source(made)
        except UserError as error:
            typer.echo(f"sizes are not known: {escape(redact(str(error)))}", err=True)


@app.command()
def status(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="folder or fsspec URL of a reinforced dataset")],
) -> None:
    """Show what a dataset holds, what is in quarantine and why, and how the last run ended."""
    from reinforce.dataset.status import read_status, status_table
    from reinforce.engine.summary import cleaned_lines

    found = read_status(dataset)
    Console().print(status_table(found))
    for layer, entry in found["quarantine"].items():
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in entry["reasons"].items())
        typer.echo(escape(f"quarantine/{layer}: {entry['files']:,} shards; {reasons}"))
    if last := found["last_run"]:
        text = f"last run {last['run']}: {last['shards']:,} shards in {last['seconds']:.0f} s, {last['message']}"
        typer.echo(escape(text))
        for line in cleaned_lines(last.get("cleaned", {})):
            typer.echo(line)


@app.command()
def train(
    config: ConfigPath,
    set_: Overrides = None,
    address: TrainingAddress = None,
) -> None:
    """Train a student from reinforced datasets, or go on after the last checkpoint of its output.

    With one rank it runs in this process, with more on Ray Train; started by torchrun, it takes torchrun's ranks.
    """
    from reinforce.student.config import load_student_config
    from reinforce.student.train import train as train_student

    checked = load_student_config(config, set_)
    results = _trained(lambda: train_student(checked, address=address))
    if _is_first_rank():
        typer.echo(results.text())


@app.command("finetune-captioner")
def finetune_captioner(config: ConfigPath, set_: Overrides = None, address: TrainingAddress = None) -> None:
    """Fine-tune a CoCa captioner on images with captions, or go on after the last checkpoint of its output.

    Runs where `train` would. The result is a model for `captioners:` of `reinforce run`.
    """
    from reinforce.captioning.config import load_captioner_config
    from reinforce.captioning.finetune import comparison, finetune

    checked = load_captioner_config(config, set_)
    results = _trained(lambda: finetune(checked, address=address))
    if _is_first_rank():
        typer.echo(results.text())
        typer.echo("held-out images, before and after:")
        typer.echo(comparison(results))


@app.command()
def tune(
    config: ConfigPath,
    set_: Overrides = None,
    address: TrainingAddress = None,
    screen_only: Annotated[
        bool, typer.Option("--screen-only", help="Tell what stored embeddings alone say of the scales; train nothing.")
    ] = False,
    record: Annotated[
        bool, typer.Option("--record", help="Put the scales that are found into dataset.json of the datasets.")
    ] = False,
) -> None:
    """Find the teachers' logit scales, and lambda, by short trainings; or go on after what is finished.

    Writes a table, a plot and a config that `reinforce train` takes to the output.
    """
    from reinforce.tuning import command
    from reinforce.tuning.config import load_tune_config
    from reinforce.tuning.tables import results_table, screening_table

    checked = load_tune_config(config, set_)
    if screen_only:
        screenings = _trained(lambda: command.screen_only(checked))
        Console().print(screening_table(screenings))
        typer.echo(f"plot: {redact(checked.output)}/{command.PLOT}")
        return
    result = _trained(lambda: command.tune(checked, address=address))
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
            help="open_clip's NAME,TAG (or NAME with --pretrained), local-dir:PATH, hf-hub:ORG/REPO, or the folder "
            "that a training wrote. Several stand side by side.",
        ),
    ],
    pretrained: Annotated[
        str | None, typer.Option(metavar="TAG", help="Tag or checkpoint of models that bring none.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file whose `evaluate` section names sets.")] = None,
    zero_shot: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=URL", help="Images with classes: a folder with a folder a class, or shards."),
    ] = None,
    retrieval: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=URL", help="Images with captions: shards, or a reinforced dataset."),
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="Of --zero-shot: `imagenet` or a text file; default: the folders' names.")
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Of --zero-shot: where shards hold it, `cls` or json:FIELD.")
    ] = None,
    templates: Annotated[
        str | None, typer.Option(help="Of --zero-shot: `openai`, `simple` (default), `none`, or a text file.")
    ] = None,
    groups: Annotated[
        str | None, typer.Option(help="Of --zero-shot: json:FIELD or a JSON file that gives each class a group.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Judge by so many images of each set of the command line.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images or texts in one forward pass.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:0.")] = "auto",
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"], typer.Option(help="Arithmetic of the forward pass.")
    ] = "fp32",
    json_: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write all of it here, refused images by name.")
    ] = None,
    clip_benchmark: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Also let the package clip_benchmark judge by the sets it downloads; needs a network.",
        ),
    ] = None,
) -> None:
    """Judge models by zero-shot classification and image-text retrieval.

    Models are given their own preprocessing. Images that cannot be decoded are left out and told.
    """
    from reinforce.evaluation import command
    from reinforce.model_names import resolve_models

    common = {"classes": classes, "label": label, "templates": templates, "groups": groups}
    common = {key: value for key, value in common.items() if value is not None}
    sets = command.evaluation_of(config, zero_shot or [], retrieval or [], common, limit, batch)
    if not sets.metrics and clip_benchmark is None:
        raise UserError("nothing to judge by: name sets with --zero-shot, --retrieval or --config.")
    with resolve_models(models, pretrained) as specs:
        report = command.judge(specs, sets, device, precision, clip_benchmark)
    Console().print(report.table())
    for line in report.lines():
        typer.echo(line)
    if json_ is not None:
        report.write(json_)


export = typer.Typer(no_args_is_help=True, help="Ship a model: what runs it where neither torch nor open_clip is.")
app.add_typer(export, name="export")


@export.command("onnx")
def export_onnx(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The folder that a training wrote, local-dir:PATH, open_clip's NAME,TAG, or hf-hub:ORG/REPO.",
        ),
    ],
    pretrained: Annotated[str | None, typer.Option(metavar="TAG", help="Tag or checkpoint of a NAME alone.")] = None,
    output: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="New folder or fsspec URL. Default: MODEL's name and -onnx."),
    ] = None,
) -> None:
    """Write image.onnx and text.onnx, tokenizer.json, preprocess.json, and a README.md with an example.

    The towers are reparameterised where the model can be, take any batch, and are compared with torch before the
    folder appears. Needs the extra: pip install 'reinforce[export]'
    """
    from reinforce.model_names import resolve_models, short_name
    from reinforce.shipping.packages import require

    require()
    from reinforce.shipping import export as shipping

    with resolve_models([model], pretrained) as specs:
        exported = shipping.export_onnx(model, specs[model], output or f"{short_name(model)}-onnx")
    for line in exported.lines():
        typer.echo(line)


@app.command()
def latency(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="open_clip's names, local-dir:PATH, or folders that trainings wrote."),
    ],
    rounds: Annotated[int, typer.Option(min=1, help="Times that each tower is measured, in turns.")] = 20,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: torch's, as many as there are cores.")] = None,
    clock: Annotated[
        Literal["wall", "process"],
        typer.Option(help="process: seconds of the process itself on all threads, where a machine is not idle."),
    ] = "wall",
    onnx_: Annotated[bool, typer.Option("--onnx", help="Also in onnxruntime; needs reinforce[export].")] = False,
    json_: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write all of it here.")] = None,
) -> None:
    """Tell parameters, operations and latency at batch 1 of models side by side, on this machine's CPU.

    Architectures are measured, with random weights and reparameterised as they are shipped; nothing is downloaded.
    """
    from reinforce.model_names import resolve_models
    from reinforce.shipping.latency import measure
    from reinforce.shipping.packages import require

    if onnx_:
        require()
    with resolve_models(models, weights=False) as specs:
        found = measure(specs, rounds=rounds, threads=threads, onnx=onnx_, clock=clock)
    Console().print(found.table())
    typer.echo(found.line())
    if json_ is not None:
        found.write(json_)


@app.command(name="captions-report")
def captions_report(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="folder or fsspec URL of a reinforced dataset")],
    captioner: Annotated[
        list[str] | None, typer.Option(help="Captioner to report on, repeatable. Default: all.")
    ] = None,
    teacher: Annotated[list[str] | None, typer.Option(help="Teacher to judge by, repeatable. Default: all.")] = None,
    out: Annotated[str, typer.Option(help="Folder or fsspec URL for report.json and the plots.")] = "captions-report",
    limit: Annotated[int, typer.Option(min=1, help="Most images to look at, evenly over the dataset.")] = 10_000,
) -> None:
    """Tell how diverse a dataset's captions are and how near to their images, beside the true captions.

    What each figure is stands in report.json, under `definitions`.
    """
    from reinforce.report.captions import captions_report as report_on
    from reinforce.report.captions_view import captions_table, write_report

    report = report_on(dataset, captioner, teacher, limit)
    Console().print(captions_table(report))
    typer.echo(f"{report['rows']:,} images; written: {', '.join(write_report(report, out))}")


def _trained(work: Callable[[], T]) -> T:
    """Do a training; one that was stopped says so, and ends with the signal's exit status."""
    from reinforce.training.stop import Stopped

    logging.basicConfig(format="%(message)s")
    logging.getLogger("reinforce").setLevel(logging.INFO)
    try:
        return work()
    except (Stopped, KeyboardInterrupt) as stopped:
        typer.echo("stopped; run again to go on after the last checkpoint", err=True)
        raise typer.Exit(stopped.status if isinstance(stopped, Stopped) else 130) from None


def _is_first_rank() -> bool:
    """Whether torchrun made this process rank 0, or no rank at all."""
    return os.environ.get("RANK", "0") == "0"


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors of the user's are one message, and the exit status tells."""
    if os.getcwd() not in sys.path:  # a class of the user's own lies beside the config
        sys.path.insert(0, os.getcwd())
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of settings that are meant
    try:
        app(args=arguments)
    except UserError as error:
        typer.echo(f"error: {escape(redact(str(error)))}", err=True)
        raise SystemExit(2) from None
