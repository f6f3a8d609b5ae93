"""``reinforce adapt``: store labels, train, choose between the released and the trained weights, and show both.

Each step continues where a stopped command ended, and can be run separately by a config in the output. The page shows
metrics before and after, the curve between the weights, and held-out images that one of both models gets right and the
other does not.
"""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import yaml

from reinforce import reports, settings
from reinforce.dataset.aligned import AlignedLayers
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.manifest import find_manifest
from reinforce.dataset.reading import Dataset
from reinforce.dataset.store import Store
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.plan.source_shards import check_output
from reinforce.engine.preflight.estimate import source_statistics
from reinforce.engine.run import run
from reinforce.errors import TooManyQuarantined, UserError
from reinforce.evaluation.encoding import EvaluatedModels
from reinforce.evaluation.evaluator import Evaluator
from reinforce.evaluation.model_names import loading_call, resolve_models, short_name
from reinforce.reports import TEMPLATES, notebook_table, picture_address, render
from reinforce.storage import Storage
from reinforce.student.config import Student as StudentSpec
from reinforce.student.config import StudentConfig
from reinforce.student.model import StudentModel, build_student
from reinforce.student.train import train
from reinforce.terminal import format_duration, plural
from reinforce.training.config import total_steps
from reinforce.tuning import adapt_config
from reinforce.tuning.adapt_config import (
    DOMAIN,
    FEWEST_IMAGES,
    HELD_OUT,
    RELEASED,
    TRAIN,
    AdaptConfig,
    Point,
    mean,
)
from reinforce.tuning.division import divide, encode_images
from reinforce.tuning.gain import CAPTIONS, CLASSES, Gain, HeldOutSet, Queries, cross_fit, one_class
from reinforce.tuning.mixtures import GRID, PICTURE, Mixtures, Sweep, percent, shares, sweep
from teachers.pixels import to_pixels
from teachers.redact import redact, redact_values
from teachers.runtime.accelerator import Accelerator
from teachers.spec import ModelSpec

PAGE = "index.html"
_KINDS = {CLASSES: "class", CAPTIONS: "caption"}
_EXAMPLES = 12  # of each set, gained and lost
_BY_CHANCE = 0.05  # a gain with a larger probability by chance is not shown by the held-out images
CONFIG = "adapt.json"
RUN_FILE, TRAINING_FILE, MODEL = "run.yaml", "train.yaml", "model"
_PROBE = 8  # images of the measurement of the rate
_MANY_EPOCHS = 100
_TOO_FEW = "held-out images: too few to tell what was gained. Add images, or hold out more: --set held_out=0.4"

Log = Callable[[str], None]


def write_page(
    config: AdaptConfig,
    sweep: Sweep,
    gain: Gain | None,
    notes: Sequence[str],
    held_out: Mapping[str, HeldOutSet],
    mixtures: Mixtures,
) -> str:
    """Write the page, one file with its pictures in it -> its path; ``notes`` are lines beside the metrics."""
    storage, out = Storage(config.output), config.output
    start, last, rule = sweep.points[0], sweep.points[-1], sweep.rule
    names = dict.fromkeys(name for point in sweep.points for name in point.metrics)
    rows = [(name, name in rule.domain, [point.metrics.get(name) for point in sweep.shown]) for name in names]
    drawn = reports.drawable(f"{out}/{PAGE}: its curve is")
    examples = []  # images of each held-out set that the chosen weights gain and lose
    for name, images in held_out.items():
        before, after = (
            images.answers(mixtures.loaded(shares(sweep.models, alpha))) for alpha in (0.0, sweep.chosen.alpha)
        )
        counts = [sum(answer.right for answer in of) for of in (before, after)]
        gained, lost = images.examples(before, after, _EXAMPLES)
        shown = [("Gained", gained), ("Lost", lost)]
        examples.append({"kind": _KINDS[name], "counts": counts, "images": len(before), "shown": shown})
    page = render(
        "adapt.html",
        title=short_name(config.released.model),
        source=redact_values(config.source),
        output=shlex.quote(out),
        style=(TEMPLATES / "report" / "report.css").read_text(encoding="utf-8"),
        gain=gain,
        notes=notes,
        general=tuple(mean(point.metrics, rule.general) for point in (start, sweep.chosen)),
        has_general=bool(rule.general),
        alpha=sweep.chosen.alpha,
        rule=rule.describe(),
        rows=rows,
        points=[
            (one.alpha, tuple(mean(one.metrics, of) for of in (rule.domain, rule.general)), one is sweep.chosen)
            for one in sweep.points
        ],
        curve=picture_address(Storage(f"{out}/model").read_bytes(PICTURE, limit=2**24), "png") if drawn else None,
        examples=examples,
        advice=[*advice(sweep, gain, start, last)],
    )
    storage.write_bytes(page.encode(), PAGE)
    return f"{out}/{PAGE}"


def advice(sweep: Sweep, gain: Gain | None, start: Point, last: Point) -> Iterator[str]:
    """What to try next, by what the points and the gain on the held-out images show."""
    rule, chosen = sweep.rule, sweep.chosen
    if not rule.general:
        yield "Name general sets (--zero-shot, --retrieval): without them nothing shows what the model forgets."
    if gain is None or (gain.gain > 0 and gain.p > _BY_CHANCE):
        yield (
            "The held-out images are too few to tell a gain from chance: add images, or hold out more of them: "
            "--set held_out=0.4."
        )
    if chosen.alpha == 0 or (gain is not None and gain.gain <= 0):
        yield (
            "The training did not help on the held-out images. Add images, check their captions by `reinforce inspect`,"
            " or train at a higher rate: --set student.train.optimizer.lr=3e-5."
        )
    elif chosen.alpha == last.alpha and mean(last.metrics, rule.domain) >= max(
        mean(point.metrics, rule.domain) for point in sweep.points
    ):
        yield "The trained weights are the best ones: train for longer, --set student.train.epochs=20."
    if rule.general and mean(last.metrics, rule.general) < mean(start.metrics, rule.general) - rule.allow:
        yield (
            "At alpha 1 more is forgotten than is allowed: raise the weights of the anchors, "
            "--set student.loss.anchor.similarities=3, or lower the rate, student.train.optimizer.lr."
        )
    yield "Another seed shows how much of the difference is chance: --set seed=1, in another folder."


@dataclass(frozen=True)
class Adapted:
    """The finished adaptation: the sweep between the weights, and where the model and the page are.

    ``gain`` is what is gained on held-out images by shares that are chosen on others; None if these are too few.
    ``notes`` are lines about copies, captions, templates and predictions.
    """

    output: str
    sweep: Sweep
    page: str
    gain: Gain | None
    notes: Sequence[str]

    @property
    def model(self) -> str:
        """Folder of the adapted model."""
        return f"{self.output}/{MODEL}"

    @property
    def alpha(self) -> float:
        """Share of the trained weights in it; 0: those of the released model."""
        return self.sweep.chosen.alpha

    @property
    def before(self) -> Mapping[str, float]:
        """Metrics of the released model, between 0 and 1."""
        return self.sweep.points[0].metrics

    @property
    def after(self) -> Mapping[str, float]:
        """Metrics of the adapted model, between 0 and 1; of the held-out images, by which it was chosen, too high."""
        return self.sweep.chosen.metrics

    def table(self) -> Any:
        return self.sweep.table()

    def lines(self) -> Sequence[str]:
        gained = [_TOO_FEW] if self.gain is None else self.gain.lines()
        return [
            *self.sweep.lines(),
            *gained,
            *self.notes,
            f"model: {self.model}",
            f"load it: {loading_call(self.model)}",
            f"page: {self.page}",
        ]

    def _repr_html_(self) -> str:
        facts = [("", redact(line)) for line in self.lines()]
        rows = [(name, percent(value), percent(self.after.get(name))) for name, value in self.before.items()]
        heads = ("metric, %", "before", "after")
        return notebook_table(redact(self.output), facts, heads, rows)

    def as_json(self) -> dict[str, Any]:
        gain = None if self.gain is None else {**asdict(self.gain), "gain": self.gain.gain}
        made = {"output": self.output, "model": MODEL, "page": self.page, **self.sweep.as_json()}
        return {**made, "gain": gain, "notes": [*self.notes]}


def adapt(config: AdaptConfig, log: Log = lambda line: None, address: str | None = None) -> Adapted:
    """Adapt a released model to images, or continue; finished steps are not repeated.

    Raises UserError for what the user can fix, before anything is computed where that is possible, and
    ``reinforce.processes.signals.Stopped`` after a signal.
    """
    storage = Storage(config.output)
    student = _load(config)
    general = Evaluator(config.general).images  # faulty sets are reported first
    domain = adapt_config.find_domain(config)
    run_config = adapt_config.run_config(config, domain, student.image.height)
    check_output(run_config)
    adapt_config.training_config(config, domain, FEWEST_IMAGES)  # faulty keys are reported before anything is written
    stated = _check_repeated(storage, config)
    plan = make_plan(run_config)
    storage.check_writable()
    storage.write_json(stated, CONFIG)
    storage.write_bytes(_yaml(run_config), RUN_FILE)
    for line in [f"source: {domain.found}", *domain.notes]:
        log(line)
    _log_estimate(config, plan, student, general, log)
    del student
    summary = run(run_config, address=address)
    if summary.status:
        raise TooManyQuarantined(f"the run has failed: {summary.text(run_config.output)}")
    data = Dataset(run_config.output, {})
    _check_captions(data, config, domain)
    begun = TRAINING_FILE in storage.names()
    domain = _domain_of_training(storage, domain) if begun else domain
    division = divide(config, domain, data, begun, partial(encode_images, config, len(data)))
    held_out, trained_on = (division.views[name] for name in (HELD_OUT, TRAIN))
    for line in division.lines:
        log(line)
    if newer := len(data) - len(held_out) - len(trained_on):
        log(f"warning: {plural(newer, 'image')} came after the training began and are not used. Name another folder.")
    used = len(trained_on) - division.without_caption
    training = adapt_config.training_config(config, domain, used)
    _check_length(training, used, log)
    storage.write_bytes(_yaml(training), TRAINING_FILE)
    left = f"; {plural(division.without_caption, 'other')} without a caption cannot be used"
    log(f"training on {plural(used, 'image')}, {len(held_out):,} are held out{left * (used < len(trained_on))}")
    train(training, address=address)
    out, sets = f"{config.output}/{MODEL}", adapt_config.sets_of(config, domain)
    trained = f"{adapt_config.training_of(config)}/student"
    with resolve_models([trained]) as found_models:
        released = ModelSpec(model=config.released.model, pretrained=config.released.pretrained)
        specs = {RELEASED: released, "trained": found_models[trained]}
        mixtures = Mixtures(specs, out, sets, precision=training.train.compute.precision)
        rule = adapt_config.rule_of(config, domain, division.unequal)
        found = sweep(mixtures, specs, out, rule, GRID, log)
    held_out_sets = {name: HeldOutSet(sets, name) for name in (CLASSES, CAPTIONS) if name in sets.own_sets}
    answers = {
        point.alpha: _answers(mixtures, shares(found.models, point.alpha), held_out_sets) for point in found.points
    }
    gain = cross_fit(found.points, rule, answers, division.units, config.seed)
    notes = [*one_class(answers[found.chosen.alpha], domain.classes), *division.lines]
    for name, one in sets.zero_shot.items():  # whose metrics depend on their templates
        named = one.templates if isinstance(one.templates, str) else ", ".join(map(repr, one.templates))
        notes.append(f"templates of zero_shot/{name}: {named}; other templates give other numbers")
    page = write_page(config, found, gain, notes, held_out_sets, mixtures)
    return Adapted(config.output, found, page, gain, notes)


def _answers(mixtures: Mixtures, weights: Mapping[str, float], sets: Mapping[str, HeldOutSet]) -> Mapping[str, Queries]:
    """The queries of the held-out images that a mixture answers right; they are kept with its metrics."""

    def compute(models: EvaluatedModels) -> dict[str, Any]:
        return {name: queries for one in sets.values() for name, queries in one.queries(models).items()}

    return {name: Queries(**queries) for name, queries in mixtures.kept(weights, "held_out", compute).items()}


def _load(config: AdaptConfig) -> StudentModel:
    """The released model, on the CPU. Raises UserError for one that cannot be trained with captions."""
    spec = StudentSpec(model=config.released.model, pretrained=config.released.pretrained)
    student = build_student(spec, seed=config.seed)
    if not student.pretrained:
        raise UserError(f"{config.released.model} has no weights. Name their tag, too: NAME,TAG.")
    return student.eval()


def _check_repeated(storage: Storage, config: AdaptConfig) -> dict[str, Any]:
    """The config without secrets.

    Raises UserError if a former command that has stored samples had another, or if the folder has other files.
    """
    stated: dict[str, Any] = redact_values(config.model_dump(mode="json"))
    before = storage.read_json(CONFIG)
    if (before is None and storage.names()) or (before is not None and "released" not in before):
        raise UserError(f"{storage.url} is not empty, and no folder of `reinforce adapt`. Name another folder for it.")
    if before not in (None, stated) and find_manifest(Store(adapt_config.dataset_of(config))) is not None:
        changed = [key for key in stated if before is not None and before.get(key) != stated[key]]
        raise UserError(
            f"{storage.url} has an adaptation with other {', '.join(changed)}. Name another folder, or repeat the "
            f"command as it was ({storage.url}/{CONFIG})."
        )
    return stated


def _check_captions(data: Dataset, config: AdaptConfig, domain: adapt_config.Domain) -> None:
    """Raise UserError if all captions are equal, or, without classes, if too few images have one."""
    layers = AlignedLayers(data.store, {SAMPLES: data.fingerprints[SAMPLES]}, {SAMPLES: ("key", "caption")})
    found = Counter[str | None]()
    for shard in data.shards:
        with layers.open(shard) as opened:
            for number in range(opened.row_groups):
                found.update(opened.read(number)[SAMPLES]["caption"].to_pylist())
    if len(found.keys() - {None}) <= 1:
        raise UserError(
            f"{config.source}: all captions are equal, so that they tell no image from another. Write one for each, "
            f"and name another folder than that of {data.store.url}, which has the captions as they were read."
        )
    if not domain.classes:
        adapt_config.held_out_images(config, found.total() - found[None])


def _yaml(config: Any) -> bytes:
    """A config as a file for its own command, with the keys that were set, without secrets."""
    keys = redact_values(config.model_dump(mode="json", exclude_unset=True, by_alias=True))
    return yaml.safe_dump(keys, sort_keys=False).encode()


def _domain_of_training(storage: Storage, domain: adapt_config.Domain) -> adapt_config.Domain:
    """The domain with the classes of the training that has begun, since when folders may have come or gone."""
    text = storage.read_bytes(TRAINING_FILE, limit=2**26).decode()
    training = settings.parse(StudentConfig, settings.load_yaml(text), f"{storage.url}/{TRAINING_FILE}")
    of_classes = training.evaluate.zero_shot.get(DOMAIN)
    return domain if of_classes is None else replace(domain, classes=[*(of_classes.classes or ())])


def _check_length(config: StudentConfig, images: int, log: Log) -> None:
    """Warn of a training that is too long for its data."""
    epochs = total_steps(config.train, images, 1) * config.train.batch / max(1, images)
    if epochs > _MANY_EPOCHS:
        log(
            f"warning: {epochs:,.0f} passes over {plural(images, 'image')} are more than the {_MANY_EPOCHS} that help: "
            "the model learns them by heart. Lower student.train.steps."
        )


def _log_estimate(config: AdaptConfig, plan: Any, student: StudentModel, general: int, log: Log) -> None:
    """Log what an adaptation will compute, and how long that takes by the rate of the released model here.

    Where the number of images is not known, nothing is logged. ``general`` is the number of general images.
    """
    statistics, teachers = source_statistics(plan), 1 + len(config.teachers)
    if statistics is None:
        return
    images = round(statistics.rows * len(plan.pending))
    crops, shares = plan.config.augmentations.count, len(GRID)
    log(
        f"about {plural(images, 'image')}, {crops} crops of each for {plural(teachers, 'teacher')}; then training, "
        f"and evaluation of {plural(shares, 'share')} of its weights, with {plural(general, 'general image')}"
    )
    no_domain = adapt_config.Domain("", "", {}, (), True, ())
    training = adapt_config.training_config(config, no_domain, max(2, round((1 - config.held_out) * images)))
    seen = (training.train.steps or 0) * training.train.batch
    evaluated = config.held_out * images + general
    evaluated = (shares + 2) * evaluated + shares * config.held_out * images  # before and after the training, too
    passes = images * (crops + 1) + 3 * seen + evaluated
    unknown = "" if teachers == 1 else ", without the other teachers"
    accelerator, image = Accelerator("auto", "auto"), student.image
    model = accelerator.place(student.clip)
    pixels = accelerator.put(torch.zeros(_PROBE, image.height, image.width, 3, dtype=torch.uint8))
    for _ in range(2):  # the first pass allocates
        accelerator.synchronize()
        start = time.perf_counter()
        with accelerator.forward():
            model.encode_image(to_pixels(pixels, image))
        accelerator.synchronize()
        seconds = time.perf_counter() - start
    time_taken = format_duration(passes * (seconds / _PROBE))
    log(f"estimate: {time_taken} on this machine by the rate of one image{unknown}")
