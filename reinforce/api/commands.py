"""The commands of the program as functions: they take a config, a dict or keywords, and return what was found, which a
notebook shows as tables.

Each raises ``UserError`` for what the user can fix. A ``config`` is the path of a YAML file, a mapping of its content
or a validated config; keywords are keys of it, which change it section by section: ``run("my.yaml", workers={"cpus":
2})``. Progress is shown on the terminal, in a notebook or in the log. Models and Ray are imported when they are needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reinforce import settings
from reinforce.config import Config
from reinforce.errors import UserError
from reinforce.processes.cores import let_waiting_threads_sleep
from reinforce.reports import notebook_table
from reinforce.settings import Address, Names, checked_arguments
from reinforce.terminal import Screen, format_bytes, format_duration, plural
from teachers.redact import redact

if TYPE_CHECKING:
    from rich.table import Table

    from reinforce.config import Config
    from reinforce.engine.check_models import CheckReport as Checked
    from reinforce.engine.preflight.check_source import FirstSample
    from reinforce.engine.preflight.estimate import PlanReport
    from reinforce.engine.record import RunSummary
    from reinforce.evaluation.command import EvaluationCommand
    from reinforce.evaluation.report import Report
    from reinforce.evaluation.suite import SuiteReport
    from reinforce.explore.report import Inspected
    from reinforce.student.config import StudentConfig
    from reinforce.training.results import Results
    from reinforce.tuning.adapt import Adapted
    from reinforce.tuning.adapt_config import AdaptConfig


@dataclass(frozen=True)
class Starter:
    """A config that ``init`` has written to ``path``; ``lines`` describe the data."""

    path: Path
    text: str = field(repr=False)
    lines: Sequence[str]

    @property
    def config(self) -> Config:
        """The config, validated."""
        from reinforce.config import load_config

        return load_config(self.path)

    def __str__(self) -> str:
        return "\n".join([*map(redact, self.lines), f"written: {self.path}"])

    def _repr_html_(self) -> str:
        return notebook_table(f"written: {self.path}", [("", line) for line in map(redact, self.lines)])


@dataclass(frozen=True)
class Planned:
    """What a run would compute: ``report`` has all of it, ``sample`` is the first one of the source.

    ``warnings`` are lines about what may be wrong.
    """

    report: PlanReport
    sample: FirstSample | None
    warnings: Sequence[str]

    @property
    def shards(self) -> int:
        """Shards of the source."""
        return self.report.plan.shards

    @property
    def pending(self) -> int:
        """Shards with something missing."""
        return len(self.report.plan.pending)

    @property
    def bytes(self) -> int | None:
        """Bytes to be written, None if those of a layer are unknown."""
        return self.report.bytes

    @property
    def seconds(self) -> float | None:
        """Expected duration, None if no rate is known."""
        effort = self.report.effort
        return None if effort is None or effort.hours is None else 3600 * effort.hours

    def table(self) -> Table:
        """Each layer with its state and expected bytes."""
        from reinforce.engine.preflight.estimate import plan_table

        return plan_table(self.report.plan, self.report.expected)

    def lines(self) -> list[str]:
        """Lines after the table."""
        return [*self.report.lines(), *([] if self.sample is None else [self.sample.line()])]

    def as_json(self) -> dict[str, Any]:
        """The object that docs/command-line.md describes."""
        return self.report.as_json(self.sample, self.warnings)

    def __str__(self) -> str:
        return "\n".join(map(redact, [*self.lines(), *self.warnings]))

    def _repr_html_(self) -> str:
        size = "unknown" if self.bytes is None else f"about {format_bytes(self.bytes)}"
        facts = [("shards", f"{self.shards:,}"), ("with something missing", f"{self.pending:,}"), ("to write", size)]
        facts += [] if self.seconds is None else [("time", f"about {format_duration(self.seconds)}")]
        facts += [("note", redact(line)) for line in [*self.report.plan.notes, *self.warnings]]
        sizes = {name: format_bytes(size) for name, size in self.report.expected.items() if size is not None}
        lines = [(name, f"{one.done:,}", sizes.get(name, "")) for name, one in self.report.plan.states.items()]
        return notebook_table(
            redact(self.report.plan.config.output), facts, ("layer", "finished shards", "to write"), lines
        )


@dataclass(frozen=True)
class Selected:
    """The view that ``select`` has written: ``kept`` of ``samples``, and what each of its ``rules`` leaves out."""

    dataset: str
    name: str
    kept: int
    samples: int
    rules: Sequence[Mapping[str, Any]]
    text: Sequence[str]

    def __str__(self) -> str:
        return "\n".join(map(redact, self.text))

    def _repr_html_(self) -> str:
        rules = [(redact(str(one["rule"])), f"{one['rows']:,}", f"{one['left_out']:,}") for one in self.rules]
        facts = [("kept", f"{self.kept:,} of {plural(self.samples, 'sample')}"), ("dataset", redact(self.dataset))]
        return notebook_table(f"view {self.name}", facts, ("rule", "samples", "left out"), rules)


#: The path of a YAML file, or its content.
Content = str | PathLike[str] | Mapping[str, Any]


@checked_arguments
def init(data: Address, output: Address | None = None, *, force: bool = False) -> Starter:
    """Look at data of any format, and write a commented config for it: to ``output``, by default named after the data.

    Raises UserError if the data cannot be read, or the config exists and not ``force``.
    """
    from reinforce.engine.starter import default_path, make_starter

    path = Path(output) if output is not None else default_path(data)
    if path.exists() and not force:
        raise UserError(f"{path} exists. Name another file, or replace it with --force (in Python force=True).")
    text, lines = make_starter(data, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return Starter(path, text, lines)


@checked_arguments
def plan(
    config: Config | Content | None = None,
    *,
    address: str | None = None,
    rate: float | None = None,
    price: float | None = None,
    storage_price: float | None = None,
    currency: str = "USD",
    hours: float | None = None,
    **keys: Any,
) -> Planned:
    """What a run would compute: layers, bytes, and time where a rate is known. Starts and writes nothing.

    ``rate`` is the number of source images a second that the models of one worker compute, by default as the last run
    of the dataset measured. ``price`` is that of a worker for an hour, ``storage_price`` that of a gigabyte (1e9 bytes)
    for a month, both in ``currency``. ``hours`` asks how many workers finish in this time. Reads one sample of the
    source, and raises UserError where a run would before it starts.
    """
    from reinforce.engine.preflight.check_machines import config_uses

    checked = settings.as_config(Config, config, **keys)
    assumed = {"rate": rate, "price": price, "storage_price": storage_price, "currency": currency, "hours": hours}
    return plan_config(checked, config_uses(checked), address, assumed)


def plan_config(
    config: Config,
    used: Any,
    address: str | None,
    assumed: Mapping[str, Any],
    show: Callable[[Planned], None] = lambda planned: None,
) -> Planned:
    """``plan`` of a config, whose ``used`` classes and places are known; ``show`` gets it before the last checks.

    ``assumed`` has the rate, prices and hours of ``plan`` by name.
    """
    from reinforce.dataset.manifest import check_classes
    from reinforce.dataset.store import Store
    from reinforce.engine.plan.plan import make_plan
    from reinforce.engine.plan.source_changes import check_copies
    from reinforce.engine.plan.source_shards import check_output
    from reinforce.engine.preflight.check_machines import machines_of_plan
    from reinforce.engine.preflight.check_source import check_source
    from reinforce.engine.preflight.estimate import Assumed, make_report, source_statistics

    given = settings.parse(Assumed, assumed, "plan")
    with contextlib.ExitStack() as connection:
        check_output(config)
        machines = connection.enter_context(machines_of_plan(address))
        current = make_plan(config)
        sample, notes = check_source(current)
        report = make_report(current, used, source_statistics(current), machines(), given)
        notes += report.effort.warnings if report.effort is not None else ()
        planned = Planned(report, sample, notes)
        show(planned)
        check_copies(current, Store(current.config.output))
        check_classes(current.codes)
        return planned


@checked_arguments
def check(
    config: Config | Content | None = None,
    *,
    options: dict[str, Any] | None = None,
    kind: Literal["teacher", "captioner"] | None = None,
    **keys: Any,
) -> Checked:
    """Load the models of a run, or a class ``"module:Class"`` with its ``options``, test them and measure their speed.

    Returns a report with ``rows`` and ``notes``. Raises UserError if a model fails, with what fails of each.
    """
    from reinforce.engine.check_models import check_class, check_config

    if (
        isinstance(config, str)
        and ":" in config
        and not config.endswith((".yaml", ".yml"))
        and not Path(config).exists()
    ):
        if keys:
            raise UserError(f"check: {', '.join(keys)} belong to a config; a class has `options` and `kind`.")
        report = check_class(config, options or {}, kind)
    elif options is not None or kind is not None:
        raise UserError("check: options and kind belong to a class; a config has both for each model.")
    else:
        report = check_config(settings.as_config(Config, config, **keys))
    if report.errors:
        raise UserError("\n".join(report.errors))
    return report


@checked_arguments
def run(
    config: Config | Content | None = None,
    *,
    address: str | None = None,
    retry_quarantined: bool = False,
    accept_changed_classes: bool = False,
    **keys: Any,
) -> RunSummary:
    """Compute every missing layer of a config and nothing else.

    Uses the initialised Ray if there is one, else the cluster at ``address`` (or RAY_ADDRESS), else this machine.
    ``retry_quarantined`` tries the shards again that are quarantined as a whole, and those whose labels could not all
    be read. ``accept_changed_classes`` extends layers of custom classes whose files have changed under one ``version``.
    Raises UserError for errors that the user must fix.
    """
    from reinforce.engine.run import run as compute

    return compute(
        settings.as_config(Config, config, **keys),
        address=address,
        retry_quarantined=retry_quarantined,
        accept_changed_classes=accept_changed_classes,
    )


@checked_arguments
def train(config: StudentConfig | Content | None = None, *, address: str | None = None, **keys: Any) -> Results:
    """Train a student to its end, from the last checkpoint in ``output`` if there is one.

    Runs in this process, under torchrun as one of its ranks, or, with ``train.compute.ranks`` above 1 or an ``address``
    (or RAY_ADDRESS), on Ray Train. Raises UserError for errors that the user can fix, and
    ``reinforce.processes.signals.Stopped`` after a signal, when a checkpoint has been written.
    """
    from reinforce.student.config import StudentConfig

    checked = settings.as_config(StudentConfig, config, **keys)
    checked.train.check_warmup(checked.train.steps)
    let_waiting_threads_sleep()
    from reinforce.student.train import train as train_student  # takes seconds, so the config is checked before

    return train_student(checked, address=address)


@checked_arguments
def adapt(config: AdaptConfig | Content | None = None, *, address: str | None = None, **keys: Any) -> Adapted:
    """Adapt a released student to images, and choose how much of the training to take; continue a stopped adaptation.

    ``keys`` are those of an adaptation's config: ``source``, ``output``, ``released``, which may be a name such as
    ``"MobileCLIP2-S0,dfndr2b"``, ``general={"zero_shot": {"pets": "pets/"}}``, and others. ``before`` and ``after`` of
    the result are metrics between 0 and 1, ``alpha`` is the share of the trained weights that was chosen. Raises
    UserError, and ``reinforce.processes.signals.Stopped`` after a signal.
    """
    from reinforce.tuning.adapt_config import AdaptConfig

    if isinstance(released := keys.get("released"), (str, PathLike)):
        keys["released"] = released_model(str(released))
    if isinstance(general := keys.get("general"), Mapping):
        keys["general"] = _with_places(general)
    checked = settings.as_config(AdaptConfig, config, **keys)
    let_waiting_threads_sleep()
    from reinforce.tuning.adapt import adapt as adapt_model  # takes seconds, so the config is checked before

    screen = Screen()
    return adapt_model(checked, lambda line: screen.log(redact(line)), address)


def released_model(name: str) -> dict[str, str]:
    """The key ``released`` of an adaptation, for the name of a model. Raises UserError."""
    from reinforce.evaluation.model_names import resolve_models

    if "://" in name:
        raise UserError(f"{name}: copy the model to this machine, and name its folder.")
    with resolve_models([name]) as specs:
        spec = specs[name]
    return {"model": str(spec.model), **({"pretrained": spec.pretrained} if spec.pretrained else {})}


@checked_arguments
def evaluate(
    models: Names,
    config: Content | None = None,
    *,
    out: Address = "evaluation",
    compare: str | None = None,
    workers: int | None = None,
    address: str | None = None,
    pretrained: str | None = None,
    device: str = "auto",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    **keys: Any,
) -> Report | SuiteReport:
    """Evaluate models, named as for `reinforce evaluate`, on sets.

    ``config`` is a YAML file with a section ``evaluate``, or that section; ``keys`` are keys of it, such as
    ``zero_shot={"pets": "pets/"}``, where an address alone stands for ``images`` (in ``retrieval`` for ``pairs``). With
    ``suite`` and ``data``, the sets of a published suite; ``out``, ``compare``, ``workers`` and ``address`` are of it.
    ``results[model].metrics`` of the report are between 0 and 1. Sets that failed are in ``failed`` of the report.
    """
    from reinforce.evaluation.command import EvaluationCommand

    if isinstance(config, (str, PathLike)):
        config = settings.section_of(config, "evaluate")
    evaluation = settings.as_config(EvaluationCommand, config or {}, **_with_places(keys))
    if evaluation.suite is None and (compare or workers or address):
        raise UserError("evaluate: compare, workers and address belong to `suite`, and none is given.")
    return evaluate_sets(models, evaluation, pretrained, device, precision, out, compare, workers, address)


def _with_places(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of an evaluation, whose sets may be addresses alone."""
    found = {**keys}
    for section, place in (("zero_shot", "images"), ("retrieval", "pairs")):
        if isinstance(sets := keys.get(section), Mapping):
            found[section] = {
                name: {place: one} if isinstance(one, (str, PathLike)) else one for name, one in sets.items()
            }
    return found


def evaluate_sets(
    models: Sequence[str],
    evaluation: EvaluationCommand,
    pretrained: str | None = None,
    device: str = "auto",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    out: str = "evaluation",
    compare: str | None = None,
    workers: int | None = None,
    address: str | None = None,
    page: str | None = None,
) -> Report | SuiteReport:
    """Evaluate models by name on the sets of a config, or on its suite. Raises UserError."""
    from reinforce.evaluation.command import evaluate_models
    from reinforce.evaluation.model_names import resolve_models
    from reinforce.evaluation.registry import TEXTLESS

    if not evaluation.metrics:
        raise UserError("nothing to evaluate on: name sets, such as `zero_shot` and `retrieval`, or a suite.")
    with resolve_models(models, pretrained, teachers=evaluation.suite in (None, *TEXTLESS)) as specs:
        if evaluation.suite is None:
            return evaluate_models(specs, evaluation, device, precision, page)
        from reinforce.evaluation.suite import evaluate_suite

        return evaluate_suite(
            specs, evaluation, out, device=device, precision=precision, compare=compare, workers=workers,
            address=address, pretrained=pretrained,
        )  # fmt: skip


@checked_arguments
def select(
    config: Any = None,
    *,
    address: str | None = None,
    **keys: Any,
) -> Selected:
    """Choose samples of a dataset by rules from what is stored of them, and write a view, which copies nothing.

    ``keys`` are ``dataset``, ``name``, ``rules`` and ``seed``. ``reinforce.open(dataset, view=name)`` reads it. Raises
    UserError, also if the rules keep no sample.
    """
    from reinforce.explore.config import SelectConfig

    return select_config(settings.as_config(SelectConfig, config, **keys), Screen().log, address)


def select_config(config: Any, log: Callable[[str], None], address: str | None) -> Selected:
    """``select`` of a validated config; ``log`` gets lines on the progress."""
    from reinforce.explore.select import report_lines
    from reinforce.explore.select import select as write_view

    def compute(references: Config) -> None:
        from reinforce.engine.run import run as compute_layers

        log(f"embedding the images of {references.source} that are not embedded yet")
        compute_layers(references, address=address)

    view = write_view(config, lambda line: log(redact(line)), address, reinforce=compute)
    total = sum(view.counts.values())
    return Selected(config.dataset, view.name, len(view), total, view.report, [*report_lines(view)])


@checked_arguments
def inspect(
    dataset: Address,
    output: Address,
    teachers: Names | None = None,
    captioners: Names | None = None,
    *,
    limit: int = 10_000,
    seed: int = 0,
    images_from: Names | None = None,
    view: str | None = None,
) -> Inspected:
    """Write a report on a dataset to a folder or URI, in place of an earlier one: open its ``index.html``.

    Looks at no more than ``limit`` samples, which ``seed`` decides. Raises UserError.
    """
    from reinforce import __version__
    from reinforce.explore.report import inspect as write_report

    if limit < 1:
        raise UserError(f"inspect: limit must be at least 1, got {limit}")
    return write_report(
        dataset, output, teachers, captioners, limit=limit, seed=seed, images_from=images_from or (), view=view,
        version=__version__,
    )  # fmt: skip
