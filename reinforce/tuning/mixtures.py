"""Weighted means of the weights of models of one architecture, tensor by tensor, statistics of norms included.

Evaluated on the sets of a config, results are kept in a file, and none is computed twice. A sweep goes between two
models (WiSE-FT, arXiv 2109.01903), evaluated over a grid of shares; a soup is the mean of several training runs that
are added greedily (arXiv 2203.05482).
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from rich.table import Table

from reinforce import reports
from reinforce.errors import UserError
from reinforce.evaluation.config import Evaluation
from reinforce.evaluation.encoding import EvaluatedModels
from reinforce.evaluation.evaluator import Evaluator
from reinforce.evaluation.report import score_table
from reinforce.processes.cores import available_cores
from reinforce.settings import flatten
from reinforce.storage import Storage
from reinforce.student.config import Student as StudentSpec
from reinforce.student.model import StudentModel, build_student, export, load_tokenizer
from reinforce.tuning.adapt_config import Point, Rule, mean
from teachers.open_clip.teacher import OpenClipEncoder
from teachers.redact import redact_values
from teachers.runtime.accelerator import Accelerator, Precision
from teachers.spec import ModelSpec

KEPT = "mixtures.json"
SWEEP, SOUP = "sweep.json", "soup.json"
PICTURE = "sweep.png"
#: Shares of the second model's weights that a sweep evaluates, as published.
GRID = tuple(round(0.1 * tenth, 1) for tenth in range(11))
_NAME_COLUMNS = 50
_MODEL = "open_clip_config.json"
State = dict[str, torch.Tensor]
#: Keys of a ``model_cfg`` that do not change what weights mean: starting values, regularisation, paths.
_IRRELEVANT = {
    "hf_model_name", "hf_model_pretrained", "hf_tokenizer_name", "init_logit_bias", "init_logit_scale",
    "patch_dropout", "timm_drop", "timm_drop_path", "timm_model_pretrained",
}  # fmt: skip


@dataclass(frozen=True)
class Mixer:
    """Models by name whose weights can be mixed, and ``student``, which takes the weights of a mixture."""

    student: StudentModel
    tokenizer: Any
    states: Mapping[str, State]

    def use(self, weights: Mapping[str, float]) -> None:
        """Load the mean of some models, weighted, into ``student``."""
        mixed = mix([self.states[name] for name in weights], [*weights.values()])
        self.student.clip.load_state_dict(mixed)

    def write(self, storage: Storage) -> None:
        """Write ``student`` as a folder that ``reinforce.Student.load`` loads."""
        with storage.temporary_folder() as folder:
            export(self.student, folder)
            storage.put_folder(folder)

    def digests(self) -> dict[str, str]:
        """A digest of the weights of each model."""
        found = {}
        for model, state in self.states.items():
            digest = hashlib.sha256()
            for name, value in sorted(state.items()):
                digest.update(name.encode())
                digest.update(value.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
            found[model] = digest.hexdigest()
        return found


def load_mixer(specs: Mapping[str, ModelSpec]) -> Mixer:
    """Load models of open_clip on the CPU.

    Raises UserError unless all have the architecture of the first, and for weights that are not finite.
    """
    students = {}
    for name, spec in specs.items():
        try:
            students[name] = build_student(StudentSpec(model=spec.name, pretrained=spec.pretrained), seed=0)
        except UserError as error:
            raise UserError(f"{name}: {str(error).removeprefix('student: ')}") from error
    first_name, first = next(iter(students.items()))
    for name, other in students.items():
        if fault := next(_differences(first, other), None):
            raise UserError(f"{first_name} and {name} cannot be mixed: {fault}. Name models of one architecture.")
    states = {}
    for name, student in students.items():
        state = states[name] = {key: value.detach().clone() for key, value in student.clip.state_dict().items()}
        if broken := [key for key, value in state.items() if not value.isfinite().all()]:
            raise UserError(f"{student.name}: {broken[0]} is not finite. Take weights of an earlier checkpoint.")
    return Mixer(first.eval(), load_tokenizer(first), states)


def mix(states: Sequence[State], weights: Sequence[float]) -> State:
    """The weighted sum of states whose tensors have equal names and shapes; equal bits where one weight is 1.

    Sums are in float64. Of integers, such as numbers of batches, the largest is taken.
    """
    used = [(state, weight) for state, weight in zip(states, weights, strict=True) if weight]
    if len(used) == 1 and used[0][1] == 1:
        return used[0][0]
    mixed: State = {}
    for name, first in used[0][0].items():
        if first.is_floating_point():
            total = torch.zeros_like(first, dtype=torch.float64)
            for state, weight in used:
                total.add_(state[name].double(), alpha=weight)
            mixed[name] = total.to(first.dtype)
        else:
            mixed[name] = torch.stack([state[name] for state, _ in used]).amax(0)
    return mixed


def _differences(one: StudentModel, other: StudentModel) -> Iterator[str]:
    """Why the weights of two models do not mean the same."""
    shapes, others = ({key: tuple(v.shape) for key, v in s.clip.state_dict().items()} for s in (one, other))
    for name in [*shapes, *others]:
        if shapes.get(name) != others.get(name):
            yield f"{name} is {shapes.get(name, 'absent')} in one and {others.get(name, 'absent')} in the other"
    if one.image != other.image:
        yield f"their images differ: {one.image} and {other.image}"
    configs, other_configs = (
        {
            key: value
            for key, value in flatten(student.config)
            if key.rpartition(".")[2] not in _IRRELEVANT and value not in (None, False, {})
        }
        for student in (one, other)
    )
    for key in [*configs, *other_configs]:
        if configs.get(key) != other_configs.get(key):
            yield f"{key} is {configs.get(key, 'absent')} in one and {other_configs.get(key, 'absent')} in the other"


class Mixtures:
    """Mixtures of some models, whose results and final weights are written to ``out``.

    Results that ``out`` has, of equal weights, sets and precision, are used. Raises UserError if the architectures
    differ, for faulty sets, and if ``out`` has results of other models or sets, or another model.
    """

    def __init__(
        self,
        specs: Mapping[str, ModelSpec],
        out: str,
        evaluation: Evaluation,
        device: str = "auto",
        precision: Precision | Literal["auto"] = "fp32",
    ) -> None:
        self._storage = Storage(out)
        kept = self._storage.read_json(KEPT)
        if kept is None:
            check_free(self._storage)
        self._accelerator = Accelerator(device, precision)
        self.mixer: Mixer = load_mixer(specs)
        self._of: dict[str, Any] = {
            "models": self.mixer.digests(),
            "sets": redact_values(evaluation.model_dump(mode="json", exclude={"every", "best", "export", "memory"})),
            "precision": self._accelerator.precision,
        }
        found = None if kept is None else kept.get("mixtures")
        whole = isinstance(found, list) and all(
            isinstance(one, dict) and isinstance(one.get(key), dict) for one in found for key in ("weights", "metrics")
        )
        if kept is not None and (kept.get("of") != self._of or not whole):
            raise UserError(f"{self._storage.url} has results of other models or sets. Name another folder.")
        self._storage.check_writable()
        self._results: list[dict[str, Any]] = [] if kept is None else kept["mixtures"]
        self._evaluator = Evaluator(evaluation)

    def metrics(self, weights: Mapping[str, float]) -> dict[str, float]:
        """The metrics, between 0 and 1, of the mean of some models with weights; sets that failed have none."""
        weights = {name: weight for name, weight in weights.items() if weight}
        for result in self._results:
            if result["weights"] == weights:
                return dict(result["metrics"])
        self.mixer.use(weights)
        student = self.mixer.student
        model = self._accelerator.place(student.clip)
        found = self._evaluator.evaluate_module(model, student.image, self.mixer.tokenizer, self._accelerator)
        metrics = self._evaluator.config.combine([found.metrics])
        self._results.append({"weights": weights, "metrics": metrics})
        self._storage.write_json({"of": self._of, "mixtures": self._results}, KEPT)
        return metrics

    def kept(
        self, weights: Mapping[str, float], name: str, compute: Callable[[EvaluatedModels], dict[str, Any]]
    ) -> Any:
        """What ``compute`` gives of a mean whose metrics are known: JSON, which is kept with them, compressed."""
        used = {one: weight for one, weight in weights.items() if weight}
        result = next(one for one in self._results if one["weights"] == used)
        if not isinstance(result.get(name), str):
            found = zlib.compress(json.dumps(compute(self.loaded(weights))).encode())
            result[name] = base64.b64encode(found).decode()
            self._storage.write_json({"of": self._of, "mixtures": self._results}, KEPT)
        return json.loads(zlib.decompress(base64.b64decode(result[name])))

    def loaded(self, weights: Mapping[str, float]) -> EvaluatedModels:
        """The mean of some models with weights, in eval mode, to encode images and texts."""
        self.mixer.use({name: weight for name, weight in weights.items() if weight})
        student = self.mixer.student
        model = self._accelerator.place(student.clip.eval())
        encoder = OpenClipEncoder(model, student.image, self.mixer.tokenizer, self._accelerator)
        config = self._evaluator.config
        return EvaluatedModels({"model": encoder}, self._accelerator, config.batch, available_cores())

    def check_report(self, name: str) -> None:
        """Raise UserError if the folder has the model of a report other than ``name``."""
        for other in {SWEEP, SOUP} - {name}:
            if self._storage.read_json(other) is not None:
                raise UserError(f"{self._storage.url} has a model, of {other}. Name another folder.")

    def write(self, weights: Mapping[str, float], report: Mapping[str, Any], name: str) -> None:
        """Write the model of some weights, and a report as ``name``."""
        self.mixer.use(weights)
        self.mixer.write(self._storage)
        self._storage.write_json(report, name)


def check_free(storage: Storage) -> None:
    """Raise UserError if a folder has a model."""
    if storage.read_json(_MODEL) is not None:
        raise UserError(f"{storage.url} has a model. Name another folder, or remove it.")


def percent(value: float | None) -> str:
    """A metric in percent, empty if there is none."""
    return "" if value is None else f"{100 * value:.2f}"


@dataclass(frozen=True)
class Sweep:
    """The metrics by share, and the share that a rule has chosen."""

    models: tuple[str, str]
    points: Sequence[Point]
    rule: Rule
    chosen: Point

    @property
    def shown(self) -> list[Point]:
        """The points of tables: the first model, the chosen share and the largest one."""
        return [self.points[0], self.chosen, self.points[-1]]

    def table(self) -> Table:
        """Metrics in percent, one column a share, in 80 columns; a star marks the chosen one."""
        shown = [point for point in self.points if point in self.shown]
        names = dict.fromkeys(name for point in self.points for name in point.metrics)
        heads = [f"{point.alpha:g}{'*' if point is self.chosen else ''}" for point in shown]
        rows = [[name, *(percent(point.metrics.get(name)) for point in shown)] for name in names]
        table = score_table(["%, by alpha", *heads], rows, [])
        table.columns[0].no_wrap, table.columns[0].max_width = False, _NAME_COLUMNS
        return table

    def lines(self) -> list[str]:
        return [f"* chosen: alpha {self.chosen.alpha:g}, the {self.rule.describe()}"]

    def as_json(self) -> dict[str, Any]:
        return {"models": [*self.models], "points": [*map(asdict, self.points)], "rule": asdict(self.rule)} | {
            "alpha": self.chosen.alpha
        }

    def draw(self, url: str) -> None:
        """Draw the mean of the domain over that of the general metrics, or over the share without general metrics."""
        made, [axes] = reports.figure(width=6.4, height=4.8)
        general = self.rule.general
        across = [100 * mean(point.metrics, general) if general else point.alpha for point in self.points]
        up = [100 * mean(point.metrics, self.rule.domain) for point in self.points]
        x_label = f"{', '.join(general)} (%)" if general else "alpha"
        reports.label(axes, "Weights between two models", x_label, f"{', '.join(self.rule.domain)} (%)")
        axes.plot(across, up, color=reports.colour(0), marker="o")
        for point, x, y in zip(self.points, across, up, strict=True):
            axes.annotate(f"{point.alpha:g}", (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
        place = self.points.index(self.chosen)
        axes.plot(
            across[place], up[place], color=reports.colour(1), marker="o", markersize=11, fillstyle="none",
            linestyle="none", label=f"chosen: {self.chosen.alpha:g}",
        )  # fmt: skip
        axes.legend(frameon=False, fontsize=9)
        reports.save(made, url)


def interpolate(specs: Mapping[str, ModelSpec], out: str, alpha: float) -> None:
    """Write the model with the weights (1 - alpha) x first + alpha x second to ``out``.

    Raises UserError if the architectures differ, or if ``out`` has a model.
    """
    storage = Storage(out)
    check_free(storage)
    storage.check_writable()
    mixer = load_mixer(specs)
    mixer.use(shares(specs, alpha))
    mixer.write(storage)


def sweep(
    mixtures: Mixtures,
    specs: Mapping[str, ModelSpec],
    out: str,
    rule: Rule,
    alphas: Sequence[float] = GRID,
    log: Callable[[str], None] = lambda line: None,
) -> Sweep:
    """Evaluate the shares, 0 included, and write the model of the chosen one, sweep.json and sweep.png to ``out``.

    Raises UserError where a metric of ``rule`` has no value for alpha 0, or if the folder has the model of a soup.
    """
    mixtures.check_report(SWEEP)
    points = []
    for alpha in sorted({0.0, *alphas}):
        points.append(Point(alpha, mixtures.metrics(shares(specs, alpha))))
        log(f"alpha {alpha:g}: {rule.means(points[-1].metrics)}")
    first, second = specs
    result = Sweep((first, second), points, rule, rule.choose(points))
    mixtures.write(shares(specs, result.chosen.alpha), result.as_json(), SWEEP)
    picture = f"{out.rstrip('/')}/{PICTURE}"
    if reports.drawable(f"{picture} is"):
        result.draw(picture)
    return result


def shares(models: Iterable[str], alpha: float) -> dict[str, float]:
    """The weights of two models in the mixture of a share ``alpha``."""
    return dict(zip(models, (1 - alpha, alpha), strict=True))


@dataclass(frozen=True)
class SoupTrial:
    """The metrics of the mean of some models; ``added`` is the last of them, ``kept`` whether it stays."""

    models: Sequence[str]
    metrics: Mapping[str, float]
    added: str
    kept: bool


@dataclass(frozen=True)
class Soup:
    """The models of the mean, and the trials that led to it: each model alone, then with those before."""

    models: Sequence[str]
    alone: Mapping[str, Mapping[str, float]]
    trials: Sequence[SoupTrial]
    rule: Rule

    def table(self) -> Table:
        """Metrics of each model alone, and of the mean, in percent."""
        columns = {**self.alone, "mean": [trial.metrics for trial in self.trials if trial.kept][-1]}
        names = dict.fromkeys(name for metrics in columns.values() for name in metrics)
        rows = [[name, *(percent(metrics.get(name)) for metrics in columns.values())] for name in names]
        return score_table(["%", *columns], rows, [*columns])

    def lines(self) -> list[str]:
        refused = [trial.added for trial in self.trials if not trial.kept]
        left_out = f"; left out: {', '.join(refused)}" if refused else ""
        return [f"mean of {', '.join(self.models)}, the {self.rule.describe()}{left_out}"]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def greedy_soup(
    mixtures: Mixtures, specs: Mapping[str, ModelSpec], rule: Rule, log: Callable[[str], None] = lambda line: None
) -> Soup:
    """Add models to a mean in the order of their metric, as long as each makes it better, and write the mean.

    Raises UserError if no model has the metrics of ``rule``, or if the folder has the model of a sweep.
    """
    mixtures.check_report(SOUP)
    alone = {}
    for name in specs:
        alone[name] = mixtures.metrics({name: 1.0})
        log(f"{name}: {rule.means(alone[name])}")
    scores = {name: mean(metrics, rule.domain) for name, metrics in alone.items()}
    ranked = sorted((name for name in specs if math.isfinite(scores[name])), key=lambda name: -scores[name])
    if not ranked:
        raise UserError(f"{', '.join(rule.domain)} has no value for any model; see the lines above.")
    chosen, best = [ranked[0]], alone[ranked[0]]
    trials = [SoupTrial(tuple(chosen), best, ranked[0], True)]
    for name in ranked[1:]:
        tried = [*chosen, name]
        metrics = mixtures.metrics({one: 1 / len(tried) for one in tried})
        log(f"mean of {len(tried)} models, with {name}: {rule.means(metrics)}")
        better = mean(metrics, rule.domain) > mean(best, rule.domain)
        trials.append(SoupTrial(tuple(tried), metrics, name, better))
        if better:
            chosen, best = tried, metrics
    result = Soup(tuple(chosen), alone, trials, rule)
    mixtures.write({name: 1 / len(chosen) for name in chosen}, result.as_json(), SOUP)
    return result
