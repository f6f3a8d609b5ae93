"""Commands that adapt released models and mix weights: ``reinforce adapt`` and ``interpolate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from reinforce.cli.common import (
    STDOUT,
    Address,
    JsonFile,
    Limit,
    Overrides,
    Pretrained,
    Retrieval,
    SetsConfig,
    ZeroShot,
    only_json,
    print_lines,
    run_training,
    show_report,
    split_names,
)
from reinforce.errors import UserError
from reinforce.processes.imports import no_garbage_collection

if TYPE_CHECKING:
    from reinforce.evaluation.config import Evaluation
    from reinforce.tuning.adapt_config import Rule


def adapt(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Images with captions, or in folders of classes.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="Folder for all that is made; a stopped one goes on.")],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="NAME,TAG of open_clip, hf-hub:ORG/REPO, or a model's folder.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML config that options and --set change.")] = None,
    set_: Overrides = None,
    teachers: Annotated[
        list[str] | None,
        typer.Option("--teachers", metavar="NAME,TAG", help="A further teacher; repeatable."),
    ] = None,
    general: Annotated[
        Path | None, typer.Option(help="YAML config whose `evaluate` section has sets on which it must stay good.")
    ] = None,
    zero_shot: ZeroShot = None,
    retrieval: Retrieval = None,
    limit: Limit = None,
    allow: Annotated[
        float | None,
        typer.Option(min=0, help="Points (%) that the general mean may lose. Default: 0.5."),
    ] = None,
    address: Address = None,
    json_: JsonFile = None,
) -> None:
    """Adapt a released model to your images, and choose how much of the training to take so that it keeps the rest.

    Stores embeddings, trains, evaluates mixtures of both weights on held-out images and on general sets (--general,
    --zero-shot, --retrieval), and writes the best model and a page. The same command goes on where one was stopped.
    """
    from reinforce import settings
    from reinforce.api.commands import released_model
    from reinforce.evaluation.command import build_evaluation
    from reinforce.evaluation.model_names import short_name
    from reinforce.tuning.adapt_config import AdaptConfig

    raw: dict[str, Any] = {} if config is None else settings.read(config)
    raw |= {"source": data, "output": output} | ({} if allow is None else {"allow": allow})
    if model is not None:
        raw["released"] = released_model(model)
    if "released" not in raw:
        raise UserError("name the released model with --model, such as --model MobileCLIP2-S0,dfndr2b.")
    named: dict[str, str] = {}
    for teacher in teachers or ():
        name = short_name(teacher)
        if (other := named.setdefault(name, teacher)) != teacher:
            raise UserError(
                f"--teachers {other} and {teacher} would both be named {name}. Name one in another way, by "
                "--set teachers.NAME.model=MODEL."
            )
        of_model, _, tag = teacher.partition(",")
        spec_of = {"model": of_model, **({"pretrained": tag} if tag else {})}
        raw["teachers"] = {**raw.get("teachers", {}), name: spec_of}
    if general or zero_shot or retrieval:
        sets = build_evaluation(general, zero_shot or (), retrieval or (), limit)
        raw["general"] = sets.model_dump(mode="json", exclude_unset=True)
    elif limit:
        raise UserError("--limit is for sets, and none is given: name some with --general, --zero-shot or --retrieval.")
    for override in set_ or ():
        settings.apply_override(raw, override)
    checked = settings.parse(AdaptConfig, raw, "the adaptation")
    with only_json(json_ == STDOUT) as print_json:
        with no_garbage_collection():  # takes seconds, so the config is checked before
            from reinforce.tuning.adapt import adapt as adapt_model
        result = run_training(lambda: adapt_model(checked, _log, address))
        show_report(result, json_, print_json)


def interpolate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="The released model and the fine-tuned one, named as for `evaluate`; for --soup two or more models.",
        ),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or fsspec URI of the model; none may be there.")],
    alpha: Annotated[
        list[float] | None,
        typer.Option(min=0, max=1, help="Share of the second. Default: 0.5; with --sweep, repeatable: 0, 0.1, ... 1."),
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Evaluate the model of each share on sets, and write the best by --metric.")
    ] = False,
    soup: Annotated[
        bool, typer.Option("--soup", help="Write the mean of the models, to which each is added that makes it better.")
    ] = False,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,...",
            help="Chosen by the mean of these. Default: the metric that selects checkpoints.",
        ),
    ] = None,
    general: Annotated[
        list[str] | None, typer.Option(metavar="NAME,...", help="Metrics whose mean may lose --allow points.")
    ] = None,
    allow: Annotated[
        float, typer.Option(min=0, help="Points (%) that the mean of --general may lose against the first model.")
    ] = 0.5,
    pretrained: Pretrained = None,
    config: SetsConfig = None,
    zero_shot: ZeroShot = None,
    retrieval: Retrieval = None,
    limit: Limit = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:0.")] = "auto",
    precision: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Precision of the forward pass.")] = "fp32",
    json_: JsonFile = None,
) -> None:
    """Write a model whose weights lie between those of two: (1 - alpha) x first + alpha x second, tensor by tensor.

    A fine-tuned model that is mixed with the one it began from often keeps most of both (WiSE-FT).

    --soup adds several trainings of one architecture in the order of their own metric (a greedy soup).

    Finished evaluations of --sweep and --soup are not repeated.
    """
    from reinforce.evaluation.model_names import loading_call, resolve_models
    from reinforce.tuning import mixtures as between

    alphas = alpha or []
    if soup and (sweep or alphas or general):
        raise UserError("--alpha, --sweep and --general are for two models, and --soup for the mean of several.")
    if len(models) < 2 or (len(models) > 2 and not soup):
        raise UserError("name two models and then the folder OUT; --soup takes more models.")
    if not sweep and not soup:
        if len(alphas) > 1:
            raise UserError("several shares are given: add --sweep, which evaluates each.")
        if config or zero_shot or retrieval or limit or metric or general or json_:
            raise UserError("sets, --metric, --general and --json belong to --sweep and --soup, and none is given.")
        with resolve_models(models, pretrained) as specs:
            between.interpolate(specs, out, alphas[0] if alphas else 0.5)
        print_lines([f"wrote {out}", f"load it: {loading_call(out)}"])
        return
    evaluation = _sets(config, zero_shot, retrieval, limit)
    rule = _rule(evaluation, metric, general, allow)
    with only_json(json_ == STDOUT) as print_json, resolve_models(models, pretrained) as specs:
        mixtures = between.Mixtures(specs, out, evaluation, device, precision)
        report = (
            between.greedy_soup(mixtures, specs, rule, _log)
            if soup
            else between.sweep(mixtures, specs, out, rule, alphas or between.GRID, _log)
        )
        show_report(report, json_, print_json)
        if json_ != STDOUT:
            print_lines([f"load it: {loading_call(out)}"])


def _sets(
    config: Path | None, zero_shot: Sequence[str] | None, retrieval: Sequence[str] | None, limit: int | None
) -> Evaluation:
    from reinforce.evaluation.command import build_evaluation

    evaluation = build_evaluation(config, zero_shot or (), retrieval or (), limit)
    if not evaluation.metrics:
        raise UserError("nothing to evaluate on: name sets with --zero-shot, --retrieval or --config.")
    return evaluation


def _rule(evaluation: Evaluation, metric: Sequence[str] | None, general: Sequence[str] | None, allow: float) -> Rule:
    """The rule that chooses, whose metrics the sets have. Raises UserError."""
    from reinforce.tuning.adapt_config import Rule

    domain = split_names(",".join(metric or ())) or [str(evaluation.best_metric)]
    others = split_names(",".join(general or ())) or []
    for name in (*domain, *others):
        if name not in evaluation.metrics:
            raise UserError(f"no set gives {name}; the metrics are: {', '.join(evaluation.metrics)}.")
    return Rule(tuple(domain), tuple(others), allow / 100)


def _log(line: str) -> None:
    print_lines([line])
