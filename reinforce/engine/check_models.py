"""``reinforce check``: load models in this process, without Ray, test them and measure their speed."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table

from reinforce.config import MODEL_SPECS, Config, load_config
from reinforce.dataset.kinds.registry import KINDS
from reinforce.dataset.manifest import find_manifest
from reinforce.dataset.store import Store
from reinforce.engine.messages import user_frames
from reinforce.engine.plan.plan import resolve_precisions, version_notes
from reinforce.engine.worker.models import MAX_AUTO_BATCH, Floats, LoadedModels, memory_hint, size_note
from reinforce.engine.worker.producers.registry import PRODUCERS
from reinforce.errors import UserError
from reinforce.processes.cores import available_cores, describe_share
from reinforce.settings import use_accelerator
from reinforce.terminal import Screen
from teachers.custom import ClassTeacherSpec
from teachers.fast_paths.usage import problem_lines, snapshot
from teachers.protocols import ImageSpec
from teachers.redact import Redactor
from teachers.registry import describe_model, load_model
from teachers.runtime.accelerator import Accelerator, is_out_of_memory
from teachers.runtime.determinism import set_flags
from teachers.spec import ModelSpec

Kind = Literal["teacher", "captioner"]

_HEADINGS = ("model", "side", "dimension", "norm", "speed", "batch")
_FIRST_BATCH, _CLASS_BATCH = 8, 64
_ENOUGH_SECONDS = 0.5  # of one batch; a larger one is not measured


@dataclass(frozen=True)
class Measurement:
    """One side of a model that works. ``rate`` is inputs per second in batches of ``batch``."""

    model: str
    side: str
    dim: int | None
    norms: Floats | None
    rate: float
    batch: int


@dataclass
class CheckReport:
    """Measurements, notes for the user, and failures."""

    rows: list[Measurement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def table(self) -> Table:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for heading in _HEADINGS:
            table.add_column(heading, justify="left" if heading in ("model", "side") else "right", no_wrap=True)
        for cells in self._cells():
            table.add_row(*cells)
        return table

    def _repr_html_(self) -> str:
        from reinforce.reports import notebook_table

        return notebook_table("models", [("note", note) for note in self.notes], _HEADINGS, self._cells())

    def _cells(self) -> list[list[str]]:
        rows = []
        for row in self.rows:
            norms = () if row.norms is None else (row.norms.min(), row.norms.max())
            norm = " to ".join(sorted({f"{n:.4f}" for n in norms})) or "-"
            rate = f"{row.rate:,.0f}" if row.rate >= 100 else f"{row.rate:.3g}"
            rows.append([row.model, row.side, str(row.dim or "-"), norm, f"{rate} {row.side}/s", str(row.batch)])
        return rows


def check_target(
    target: str, options: str | None = None, kind: Kind | None = None, set_: list[str] | None = None
) -> CheckReport:
    """Check the models of a YAML config, with ``set_`` as overrides, or a class ``module:Class``.

    ``options`` are the keyword arguments of the class as JSON. Raises UserError for a wrong target.
    """
    if Path(target).suffix in (".yaml", ".yml") or Path(target).is_file():
        if options is not None or kind is not None:
            raise UserError("--options and --kind belong to a class; a config has both for each model")
        return check_config(load_config(target, set_))
    if ":" not in target:
        raise UserError(f"{target} is neither a YAML file nor a class such as our_teachers:Tiny")
    if set_:
        raise UserError("--set belongs to a config; use --options for the keyword arguments of a class")
    try:
        parsed = json.loads(options or "{}")
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise UserError("""--options must be a JSON object, such as '{"width": 32}'""")
    return check_class(target, parsed, kind)


def check_config(config: Config) -> CheckReport:
    """Check every model of a config on the device, with the threads and up to the batch of its workers."""
    report, redact = CheckReport(), Redactor(config.model_dump(mode="json"))
    machine = [{"CPU": available_cores(), "GPU": torch.cuda.device_count()}]
    workers = config.workers.fitted_to(machine)
    config, report.notes = resolve_precisions(config, lambda: find_manifest(Store(config.output)), lambda: machine)
    device = "cuda" if workers.gpus else "cpu"
    largest = MAX_AUTO_BATCH if workers.batch == "auto" and workers.gpus else workers.images
    set_flags(device, workers.deterministic)
    use_accelerator(config.accelerator)
    Screen().log(f"{workers.describe()}, batches of {largest:,}, device {device}")
    threads = torch.get_num_threads()
    torch.set_num_threads(workers.cores)
    try:
        for name, spec in (one for of in config.models.values() for one in of.items()):
            if spec.published:
                report.notes.append(f"{name} is read from what others have published: no model is loaded")
            else:
                image = _check_model(report, redact, name, spec, device, largest)
                if spec.section == "teachers" and (note := size_note(name, image, config.augmentations.size)):
                    report.notes.append(note)
    finally:
        torch.set_num_threads(threads)
    report.notes += map(redact, problem_lines(snapshot()))
    return report


def check_class(target: str, options: dict[str, Any], kind: Kind | None = None) -> CheckReport:
    """Check a custom class on CUDA if available, else on the CPU."""
    report, redact = CheckReport(), Redactor(options)
    spec: dict[str, Any] = {"class": target, "options": options}
    try:
        cls = ClassTeacherSpec.model_validate(spec).import_class()
        methods = {section: one.methods for section, one in MODEL_SPECS.items()}
        has_method = (any(callable(getattr(cls, method, None)) for method in of) for of in methods.values())
        found = [f"{kind}s"] if kind else [*itertools.compress(methods, has_method)]
        if len(found) != 1:
            every = ", ".join(f"`{method}`" for of in methods.values() for method in of)
            has = f"methods of {' and '.join(found)}" if found else f"none of {every}"
            raise ValueError(f"class {cls.__name__} has {has}: add a method, or set --kind teacher or --kind captioner")
        checked: ModelSpec = MODEL_SPECS[found[0]].model_validate(spec)
    except ValueError as error:
        raise UserError(redact.cut(f"{error}{user_frames(error)}")) from error
    set_flags("auto")
    use_accelerator("fast")
    device = "cuda" if torch.cuda.is_available() else "cpu"  # as in a run, which does not use MPS
    Screen().log(f"{describe_share(torch.get_num_threads(), 0)}, batches of {_CLASS_BATCH}, device {device}")
    _check_model(report, redact, cls.__name__, checked, device, _CLASS_BATCH)
    return report


def _check_model(
    report: CheckReport, redact: Redactor, name: str, spec: ModelSpec, device: str, batch: int
) -> ImageSpec | None:
    """Add a model's measurements to the report, or what failed -> the preprocessing of its images, if it has some."""
    image: ImageSpec | None = None
    try:
        info = describe_model(name, spec)
        model: Any = load_model(name, spec, device)
        models, image = LoadedModels({spec.section: {name: model}}, Accelerator(device)), getattr(model, "image", None)
        found = len(report.rows)
        for kind in (kind for kind in KINDS.values() if kind.section == spec.section):
            target = str(kind.target_section)
            if target != kind.section and getattr(spec, target, None) is None:
                continue
            side = PRODUCERS[kind.name].side(models, name, info, spec.resolved_precision)
            if side is not None:  # checked once more in the batch that was found
                norms = side.check(None)
                rate, size = _measure(models, side.prepare, batch, f"{name} ({kind.unit})")
                side.check(size)
                dim = getattr(model, "dim", None)
                report.rows.append(Measurement(name, kind.unit, dim, norms, rate * side.outputs, size))
        if len(report.rows) == found:
            label = spec.label.format(name)
            report.notes.append(f"{label} sees more than pixels and captions: it is loaded, and not tested")
        report.notes += version_notes([info.identity])
        if spec.precision == "fp8":
            report.notes.append(f"{name}: each worker of a run compares fp8 with bf16 on its first crops")
    except UserError as error:
        report.errors.append(redact.cut(str(error)))
    except Exception as error:  # a model may raise anything
        report.errors.append(redact.cut(f"{error}{user_frames(error)}"))
    return image


def _measure(
    models: LoadedModels, prepare: Callable[[int], Callable[[], Any]], largest: int, what: str
) -> tuple[float, int]:
    """Inputs per second in the largest batch that fits and is worth its time, and the size of that batch."""
    size = min(_FIRST_BATCH, largest)
    best = None
    while True:
        try:
            run = prepare(size)
            with models.use_accelerator():
                run()  # warm-up
                models.accelerator.synchronize()
                start = time.perf_counter()
                run()
                models.accelerator.synchronize()
        except Exception as error:
            if best is not None and is_out_of_memory(error):
                return best
            raise UserError(
                f"{what} fails in a batch of {size}: {type(error).__name__}: {error}{user_frames(error)}"
                f"{memory_hint(error)}"
            ) from error
        seconds = time.perf_counter() - start
        best = size / seconds, size
        if seconds > _ENOUGH_SECONDS or size == largest:
            return best
        size = min(2 * size, largest)
