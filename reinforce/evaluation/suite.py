"""Suites of published sets: download from the Hub into a folder, evaluation, and results that are kept.

Each set is downloaded at one revision, which is recorded in the folder. The same command continues: complete files are
kept, others go on where they ended, at the recorded revision. Models are evaluated in this process, or side by side by
workers on Ray, each with all models on one accelerator. Finished sets are kept as lines of JSON, the others computed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from reinforce import reports
from reinforce.errors import UserError
from reinforce.evaluation.command import EvaluationCommand
from reinforce.evaluation.kinds.base import SetFiles, find_files, where_expected
from reinforce.evaluation.kinds.registry import KINDS
from reinforce.evaluation.model_names import model_errors, resolve_models
from reinforce.evaluation.registry import TEXTLESS, SuiteSet, published_metrics, select_sets
from reinforce.evaluation.report import Outcome, name_refused, score_table
from reinforce.images.policy import PUBLISHED_POLICY
from reinforce.processes.cores import available_cores, cores_per_process
from reinforce.processes.parallel import Actors
from reinforce.settings import use_accelerator
from reinforce.source.urls import canonical, filesystem, read_whole
from reinforce.storage import Storage, write_file
from reinforce.terminal import Screen, format_bytes, plural
from teachers.redact import redact
from teachers.spec import ModelSpec, TeacherSpec

if TYPE_CHECKING:
    from reinforce.evaluation.encoding import EvaluatedModels
    from teachers.runtime.accelerator import Precision

#: Beside the sets: the repository, the revision and the bytes of each, by its key.
REVISIONS = "revisions.json"
_CONNECTIONS = 4  # few, so that the Hub's limit of requests is not reached
#: A line of a result file: ``key``, ``dataset`` and ``metrics`` as DataComp writes them, and what they were made of.
Line = dict[str, Any]
_OTHER_SIZE = "*"
_PLAIN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*(?<!-[0-9a-f]{8})")
_STEM_CHARACTERS = 100


@dataclass(frozen=True)
class _Published:
    """A set as the Hub has it at a revision: sizes of its files in bytes by name."""

    one: SuiteSet
    repository: str
    revision: str
    files: dict[str, int]

    def missing(self, folder: Path) -> dict[str, int]:
        """The files that are not complete in the folder of the set."""
        sizes = {name: folder / name for name in self.files}
        sizes_here = {name: path.stat().st_size for name, path in sizes.items() if path.is_file()}
        return {name: size for name, size in self.files.items() if sizes_here.get(name) != size}


def fetch_sets(suite: str, root: Path, names: Sequence[str], *, dry_run: bool, log: Callable[[str], None]) -> None:
    """Download the sets that are not complete below ``root``; with ``dry_run``, only log what each takes.

    Raises UserError where the disk has no room, and at the end for sets that could not be downloaded.
    """
    recorded = _read_revisions(root)
    failed: list[str] = []
    found: list[_Published] = []
    needed = total = 0
    for one in select_sets(suite, names):
        with _failing(one, failed, log):
            if not one.on_hub:
                raise UserError(f"it is not on the Hub in its layout; see {one.page} and docs/evaluation.md")
            published = _look_up(one, recorded.get(one.key, {}).get("revision"))
            found.append(published)
            missing, size = sum(published.missing(root / one.folder).values()), sum(published.files.values())
            needed, total = needed + missing, total + size
            recorded[one.key] = {"repository": published.repository, "revision": published.revision, "bytes": size}
            sizes = f"{format_bytes(size)}, {format_bytes(missing)} to download"
            log(f"{one.name}: {sizes}; revision {published.revision[:12]}")
    log(f"{len(found)} sets: {format_bytes(total)}, {format_bytes(needed)} to download")
    if not dry_run:
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
        if needed > free:
            raise UserError(
                f"{root}: {format_bytes(needed)} are to be downloaded, and {format_bytes(free)} are free. Make room, "
                "or choose sets with --sets."
            )
        write_file((json.dumps(recorded, indent=2) + "\n").encode(), str(root / REVISIONS))
        for published in found:
            with _failing(published.one, failed, log):
                _download(published, root)
                log(f"{published.one.name}: complete")
    if failed:
        raise UserError(f"sets that are not complete: {', '.join(failed)}. The same command continues.")


@contextlib.contextmanager
def _failing(one: SuiteSet, failed: list[str], log: Callable[[str], None]) -> Iterator[None]:
    """Log a UserError inside, and add the set to those that ``failed``."""
    try:
        yield
    except UserError as error:
        failed.append(one.key)
        log(f"{one.name}: {error}")


def _look_up(one: SuiteSet, revision: str | None) -> _Published:
    """The files of a set at a revision; default: of its branch. Raises UserError."""
    from huggingface_hub import HfApi

    repository, _, branch = one.published.partition("@")
    try:
        info = HfApi().dataset_info(repository, revision=revision or branch or None, files_metadata=True)
    except Exception as error:  # of the Hub, of the network, of the client's checks
        gone = (
            f" Or remove {one.key} from {REVISIONS}, if the Hub has revision {revision[:12]} no longer."
            if revision
            else ""
        )
        raise UserError(_describe_fetched(one, error) + gone) from error
    files = {sibling.rfilename: int(sibling.size or 0) for sibling in info.siblings or ()}
    if not files:
        raise UserError(f"the Hub lists no files; see {one.page}")
    return _Published(one, repository, str(info.sha), files)


def _download(published: _Published, root: Path) -> None:
    from huggingface_hub import snapshot_download

    one, folder = published.one, root / published.one.folder
    for name in published.missing(folder):
        (folder / name).unlink(missing_ok=True)  # of another size, which the client may take for complete
    try:
        snapshot_download(
            published.repository, repo_type="dataset", revision=published.revision, local_dir=folder,
            max_workers=_CONNECTIONS,
        )  # fmt: skip
    except Exception as error:
        raise UserError(_describe_fetched(one, error)) from error
    if missing := published.missing(folder):
        raise UserError(f"{len(missing)} of {len(published.files)} files are not complete, such as {min(missing)}")


def _describe_fetched(one: SuiteSet, error: Exception) -> str:
    text = redact(" ".join(str(error).split()))[:300]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        advice = f"Look at {one.page}; where it asks for a login or for consent, give them there and set HF_TOKEN."
    elif status == 429:
        advice = "That is the limit of requests: wait for some minutes, and set HF_TOKEN, which has a higher one."
    else:
        advice = "Try again."
    return f"{type(error).__name__}: {text} {advice}"


def _read_revisions(root: Path) -> dict[str, Any]:
    path = root / REVISIONS
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(key): dict(about) for key, about in found.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). Remove it; the sets are then of the newest revisions."
        ) from error


class ResultFile:
    """The lines of one model in the folder of results, by the keys of sets; each new line replaces the file.

    ``identity`` is of the model as it is now. ``outdated`` are the keys of lines that are not used, since they are of
    another version of the metric.
    """

    def __init__(self, folder: str, model: str, identity: str = "") -> None:
        self.url = f"{folder.rstrip('/')}/{file_name(model)}"
        self.outdated: set[str] = set()
        self._identity = identity
        self._lines: dict[str, Line] = {}
        fs, path = filesystem(self.url)
        if fs.exists(path):
            try:
                lines = [json.loads(line) for line in read_whole(fs, path).decode().splitlines() if line.strip()]
                self._lines = {line["key"]: line for line in lines if line["model"].rpartition("@")[0] == model}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{canonical(self.url)} has a line that is not of results ({error}). Remove the file."
                ) from error

    def line(self, one: SuiteSet) -> Line | None:
        """The line of a set that this model has with this version of the metric, else None.

        Its ``files`` are the state of the files that were read, its ``content`` is the digest of what was in them.
        """
        line = self._lines.get(one.key)
        if line is None or line["model"] != self._identity:
            return None
        if line["metric"] == metric_version(one):
            return line
        self.outdated.add(one.key)
        return None

    def main_metric(self, key: str) -> float | None:
        """The main metric of a set, of any files; None if it has no line."""
        return self._lines[key]["metrics"]["main_metric"] if key in self._lines else None

    def add(self, one: SuiteSet, line: Line) -> Line:
        """Write the line of a set in place of an earlier one, and return it as it is written. Raises UserError."""
        made_of = {"model": self._identity, "metric": metric_version(one)}
        line = self._lines[one.key] = {"key": one.key, "dataset": one.name, **line, **made_of}
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in self._lines.values())
        try:
            write_file(text.encode(), self.url)
        except OSError as error:
            raise UserError(
                f"{canonical(self.url)} cannot be written: {error}. Name another folder with --out."
            ) from error
        return line


def metric_version(one: SuiteSet) -> str:
    """Settings that determine the metrics of a set, besides its content and the model."""
    return f"{one.kind} {KINDS[one.kind].version}, {one.main_metric}, {PUBLISHED_POLICY}"


def file_name(model: str) -> str:
    """The file of a model's results, which no other model has, also where a storage ignores the case of letters.

    Names of paths and others with more than lower-case letters, digits, '.', '_' and '-' end with a hash of the name.
    """
    if _PLAIN_NAME.fullmatch(model):
        return f"{model}.jsonl"
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-")[-_STEM_CHARACTERS:].lstrip(".-") or "model"
    return f"{stem}-{hashlib.blake2b(model.encode(), digest_size=4).hexdigest()}.jsonl"


@dataclass
class SuiteReport:
    """Lines by model and key; ``absent`` and ``failed`` say why a set has none. ``published`` are main metrics."""

    suite: str
    total: int  # sets of the whole suite
    sets: list[SuiteSet]
    results: dict[str, dict[str, Line]]
    published: Mapping[str, float] = field(default_factory=dict)
    compared: str | None = None
    absent: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def evaluated(self) -> list[SuiteSet]:
        """The sets with a result of every model."""
        return [one for one in self.sets if all(one.key in lines for lines in self.results.values())]

    def scores(self, model: str) -> dict[str, float]:
        """A model's main metrics by key."""
        return {key: line["metrics"]["main_metric"] for key, line in self.results[model].items()}

    def mean(self, model: str) -> float | None:
        """Mean of a model's main metrics over the evaluated sets."""
        return self._mean(self.scores(model))

    def _mean(self, scores: Mapping[str, float]) -> float | None:
        """Mean over the evaluated sets; None if one of them has no score."""
        found = [scores[one.key] for one in self.evaluated if one.key in scores]
        return sum(found) / len(found) if found and len(found) == len(self.evaluated) else None

    def rows(self) -> list[list[str]]:
        """The cells of the table, the header first; metrics are in percent."""
        differences = [f"{model} - published" if len(self.results) > 1 else "difference" for model in self.results]
        rows = [["set", "metric", *self.results, *((self.compared, *differences) if self.compared else ())]]
        scores = [self.scores(model) for model in self.results]
        noted = {key for lines in self.results.values() for key, line in lines.items() if line["notes"]}
        for one in self.sets:
            why = "missing" if one.key in self.absent else "failed" if one.key in self.failed else ""
            of_set = [of_model.get(one.key) for of_model in scores]
            cells = self._cells(of_set, self.published.get(one.key), one.key in noted, why)
            rows.append([one.name, one.main_metric, *cells])
        count = f"mean of {len(self.evaluated)}" + f" of {self.total}" * (len(self.evaluated) < self.total) + " sets"
        means = [self._mean(of_model) for of_model in scores]
        return [*rows, [count, "", *self._cells(means, self._mean(self.published), bool(noted))]]

    def _cells(self, scores: Sequence[float | None], published: float | None, other: bool, why: str = "") -> list[str]:
        """Cells of scores, of what is published and of differences, which sets of ``other`` sizes do not have."""
        cells = [why if score is None else f"{100 * score:.2f}{_OTHER_SIZE * other}" for score in scores]
        if not self.compared:
            return cells
        if published is None:
            return [*cells, "", *("" for _ in scores)]
        differences = ["" if score is None or other else f"{100 * (score - published):+.2f}" for score in scores]
        return [*cells, f"{100 * published:.2f}", *differences]

    def table(self) -> Table:
        """Main metrics in percent, one column per model, and what is published."""
        header, *rows = self.rows()
        return score_table(header, rows, [*self.results], texts=2)

    def markdown(self) -> str:
        """The table and the lines below it as Markdown."""
        header, *rows = ([cell.replace("|", "\\|").replace("*", "\\*") for cell in row] for row in self.rows())
        rule = ["---", "---", *["---:"] * (len(header) - 2)]
        table = "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))
        return "\n".join([table, "", *(f"- {line}" for line in self.lines()), ""])

    def lines(self) -> list[str]:
        """Caveats of the numbers: sets that are missing, failed, or differ from the published ones."""
        lines: dict[str, None] = {}
        for one in self.sets:
            if one.key in self.absent:
                lines[f"{one.name} is missing, and not in the mean: {self.absent[one.key]}"] = None
            if one.key in self.failed:
                lines[f"{one.name} failed, and is not in the mean: {self.failed[one.key]}"] = None
            for of_model in self.results.values():
                line = of_model.get(one.key, {})
                lines |= {f"{_OTHER_SIZE} {one.name}: {note}": None for note in line.get("notes", ())}
                lines |= {f"{one.name}: {note}": None for note in line.get("refused", ())}
        if len(self.evaluated) < self.total:
            lines[f"The mean is not that of the {self.total} sets of {self.suite}."] = None
        return list(lines)

    def as_json(self) -> dict[str, Any]:
        """Lines by model in the order of the sets, their mean, and the sets without a result."""
        models = {
            model: {"mean": self.mean(model), "results": [lines[one.key] for one in self.sets if one.key in lines]}
            for model, lines in self.results.items()
        }
        published = {one.key: self.published[one.key] for one in self.sets if one.key in self.published}
        compared = {"name": self.compared, "main_metrics": published} if self.compared else None
        sets = [one.key for one in self.evaluated]
        missing = {"missing": self.absent, "failed": self.failed}
        return {"suite": self.suite, "sets": sets, "models": models, **missing, "published": compared}

    def draw(self, url: str) -> None:
        """Draw the main metric of each set and model, with chance and what is published."""
        sets = self.evaluated[::-1]
        figure, (axes,) = reports.figure(height=1.5 + 0.22 * len(sets))
        rows = range(len(sets))
        axes.scatter(
            [100 * one.chance if one.chance is not None else float("nan") for one in sets],
            rows, marker="|", color="#6b7280", label="chance",
        )  # fmt: skip
        if self.compared:
            theirs = [100 * self.published.get(one.key, float("nan")) for one in sets]
            axes.scatter(
                theirs, rows, s=60, facecolors="none", edgecolors="#1f2328", label=f"{self.compared}, published"
            )
        for number, model in enumerate(self.results):
            scores = self.scores(model)
            axes.scatter([100 * scores[one.key] for one in sets], rows, s=24, color=reports.colour(number), label=model)
        axes.set_yticks([*rows], [one.name for one in sets])
        axes.set_xlim(0, 100)
        reports.label(axes, f"{self.suite}: main metrics of {len(sets)} sets", "main metric (%)", "")
        reports.legend(axes)
        reports.save(figure, url)


@dataclass(frozen=True)
class SetJob:
    """A set, its files, and the names of the models that lack a result on it.

    ``kept`` has the content of kept results by model, whose files had another state: a result is kept if the files
    still have this content.
    """

    one: SuiteSet
    files: SetFiles
    names: tuple[str, ...]
    kept: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """How the models of a command are loaded: their ``names`` there, and the arguments of ``evaluate_suite``."""

    names: tuple[str, ...]
    pretrained: str | None
    device: str
    precision: Precision
    batch: int
    teachers: bool
    accelerator: Literal["fast", "plain"]


def run_job(
    job: SetJob, models: Callable[[], EvaluatedModels], progress: Callable[[int], None], threads: int
) -> Outcome | str:
    """The outcome of the models without a result of this content, or why the set cannot be used.

    ``models`` loads all models, where one is needed.
    """
    from reinforce.evaluation.evaluator import evaluate_published, read_content
    from reinforce.evaluation.reading import ContentDigest

    try:
        content = read_content(job.one, job.files, threads) if job.kept else ""
    except UserError as error:
        return str(error)
    names = (*job.names, *(name for name, known in job.kept.items() if known != content))
    if not names:
        return Outcome({}, 0, [], content=content)
    loaded = models()
    needed = replace(loaded, encoders={name: loaded.encoders[name] for name in names})
    try:
        return evaluate_published(job.one, job.files, needed, ContentDigest(), progress)
    except UserError as error:
        return str(error)


def count_workers(workers: int | None, address: str | None, device: str) -> int | None:
    """Number of workers on Ray, or None where the sets are evaluated in this process. Connects to nothing.

    Raises UserError for a device that several workers cannot share.
    """
    if workers is not None and workers > 1 and ":" in device:
        raise UserError(f"--workers {workers}: each needs an accelerator of its own; --device {device} is one.")
    if address or os.environ.get("RAY_ADDRESS"):
        return workers or 0  # as many as the cluster has accelerators
    if workers is None and device in ("auto", "cuda"):
        import torch

        workers = torch.cuda.device_count()
    return workers if workers is not None and workers > 1 else None


class EvaluateSet:
    """Evaluates sets in a worker, which loads the models once; in ``folder`` if the machine has it."""

    def __init__(self, options: Options, folder: str, threads: int) -> None:
        self._options, self._folder, self._threads = options, folder, threads
        self._models: EvaluatedModels | None = None
        self._copies = contextlib.ExitStack()  # of remote models

    def __call__(self, job: SetJob) -> Outcome | str:
        """The outcome, or why the set cannot be used. Raises UserError for a model that cannot be loaded."""
        if os.path.isdir(self._folder):
            os.chdir(self._folder)
        threads = min(self._threads, available_cores())
        return run_job(job, lambda: self._load(threads), lambda _: None, threads)

    def _load(self, threads: int) -> EvaluatedModels:
        if self._models is None:
            from reinforce.evaluation.encoding import load_models

            options = self._options
            use_accelerator(options.accelerator)
            specs = self._copies.enter_context(
                resolve_models(options.names, options.pretrained, teachers=options.teachers)
            )
            named = {redact(name): spec for name, spec in specs.items()}
            self._models = load_models(named, options.device, options.precision, options.batch, threads)
        return self._models


def evaluate_suite(
    specs: Mapping[str, ModelSpec],
    evaluation: EvaluationCommand,
    out: str,
    *,
    device: str = "auto",
    precision: Precision = "fp32",
    compare: str | None = None,
    workers: int | None = None,
    address: str | None = None,
    pretrained: str | None = None,
) -> SuiteReport:
    """Evaluate all models together on the suite of a config, and write lines, a table and a picture to ``out``.

    ``workers`` evaluate sets side by side on Ray, at ``address`` or RAY_ADDRESS if there is one; they resolve the names
    of ``specs``, with the tag ``pretrained``. Default: one for each accelerator. One alone works in this process.

    A set that is missing, or that cannot be evaluated, is in the report with the reason. Raises UserError for other
    faults: an unknown name to compare with, a model that cannot be loaded, no set at all.
    """
    suite, root, sets = evaluation.suite or "", evaluation.data or "", evaluation.suite_sets
    count = count_workers(workers, address, device)
    switch = use_accelerator(evaluation.accelerator)
    options = Options(tuple(specs), pretrained, device, precision, evaluation.batch, suite in TEXTLESS, switch)
    specs = {redact(name): spec for name, spec in specs.items()}  # they are written to files
    published = published_metrics(compare) if compare else {}
    stores = {name: ResultFile(out, name, _identity(name, spec, precision)) for name, spec in specs.items()}
    report = SuiteReport(suite, len(select_sets(suite)), sets, {name: {} for name in specs}, published, compare)
    present: list[tuple[SuiteSet, SetFiles]] = []
    for one in sets:
        try:
            files = find_files(one, root)
        except UserError as error:
            report.failed[one.key] = str(error)
            continue
        if files is None:
            report.absent[one.key] = where_expected(one, root)
        else:
            present.append((one, files))
    if not present and not report.failed:
        where = report.absent[sets[0].key]
        raise UserError(f"--data has none of the {len(sets)} sets: {sets[0].name} is {where}.")
    Storage(out).check_writable()
    jobs = _plan(present, stores, report.results)
    done = _in_turn(jobs, specs, options) if count is None else _side_by_side(jobs, options, address, count)
    for job, outcome in done:
        key = job.one.key
        if isinstance(outcome, str):
            report.failed[key] = outcome
            continue
        if outcome.failed:
            report.failed[key] = " ".join(f"{name}: {reason}" for name, reason in outcome.failed.items())
        for name in {*job.names, *job.kept} - outcome.failed.keys():
            kept = stores[name].line(job.one)  # of equal content, where nothing is computed
            line = _line(job, outcome, name) if name in outcome.metrics else dict(kept or {})
            report.results[name][key] = stores[name].add(job.one, line | {"files": job.files.state})
    write_file(report.markdown().encode(), f"{out.rstrip('/')}/{suite}.md")
    picture = f"{out.rstrip('/')}/{suite}.png"
    if report.evaluated and reports.drawable(f"{picture} is"):
        report.draw(picture)
    return report


def _plan(
    present: Sequence[tuple[SuiteSet, SetFiles]],
    stores: Mapping[str, ResultFile],
    results: dict[str, dict[str, Line]],
) -> list[SetJob]:
    """Add the lines that fit to ``results`` -> what is to be read or evaluated.

    Where a model has a line, but the state of the files has changed, their content decides.
    """
    jobs = []
    for one, files in present:
        names, kept = [], {}
        for name, store in stores.items():
            line = store.line(one)
            if line is None:
                names.append(name)
            elif files.state and line.get("files") == files.state:
                results[name][one.key] = line
            else:
                kept[name] = str(line["content"])
        if names or kept:
            jobs.append(SetJob(one, files, tuple(names), kept))
    for name, store in stores.items():
        if store.outdated:
            Screen().log(
                f"{name}: {plural(len(store.outdated), 'result')} of another version of the metric computed again"
            )
    return jobs


def _in_turn(
    jobs: Sequence[SetJob], specs: Mapping[str, ModelSpec], options: Options
) -> Iterator[tuple[SetJob, Outcome | str]]:
    """Evaluate sets one after another in this process -> each with its outcome, or why it cannot be used."""
    if not jobs:
        return
    from reinforce.evaluation.encoding import load_models

    threads = available_cores()
    models = cache(partial(load_models, specs, options.device, options.precision, options.batch, threads))
    for job in jobs:
        if job.names:
            models()
        start = time.monotonic()
        with Screen() as screen:
            outcome = run_job(job, models, partial(_draw, screen, job.one), threads)
            screen.log(_describe(job, outcome, f" in {time.monotonic() - start:.0f} s"))
        yield job, outcome


def _side_by_side(
    jobs: Sequence[SetJob], options: Options, address: str | None, workers: int
) -> Iterator[tuple[SetJob, Outcome | str]]:
    """Evaluate sets by workers on Ray, the largest first. One whose worker dies each time has that as its outcome.

    Raises UserError if there are fewer accelerators than ``workers``; 0: one for each.
    """
    if not jobs:
        return
    from reinforce.processes.cluster import live_resources, ray_cluster

    with contextlib.ExitStack() as stack:
        stack.enter_context(ray_cluster(address, log_to_driver=False))
        nodes = live_resources()
        gpus = 0 if options.device == "cpu" else int(sum(node.get("GPU", 0) for node in nodes))
        count = workers or max(1, gpus)
        if gpus and count > gpus:
            raise UserError(f"--workers {count}: there are {gpus} accelerators. Lower it, or use --device cpu.")
        evaluate = EvaluateSet(options, os.getcwd(), cores_per_process(nodes, count, 1.0 if gpus else 0.0))
        pool = stack.enter_context(Actors(count, 1 if gpus else 0))
        screen = stack.enter_context(Screen())
        screen.log(f"{plural(len(jobs), 'set')} by {plural(min(pool.limit(), len(jobs)), 'worker')}")
        largest = sorted(jobs, key=lambda job: -job.one.size)
        found = pool.map(evaluate, largest, name=lambda job: job.one.name, lost=lambda job, reason: reason)
        for done, (job, outcome) in enumerate(found, start=1):
            screen.log(_describe(job, outcome))
            screen.draw(f"{done} of {len(jobs)} sets", done, len(jobs))
            yield job, outcome


def _draw(screen: Screen, one: SuiteSet, images: int) -> None:
    screen.draw(f"{one.name}: {images:,} images", images, one.size)


def _describe(job: SetJob, outcome: Outcome | str, time_taken: str = "") -> str:
    one = job.one
    if isinstance(outcome, str):
        return f"{one.name} failed: {outcome}"
    scores = [f"{name} {100 * (metrics[one.main_metric] or 0):.2f}" for name, metrics in outcome.metrics.items()]
    parts = [f"{one.main_metric}: {', '.join(scores)}"] if scores else []
    parts += [f"{name} failed: {reason}" for name, reason in outcome.failed.items()]
    kept = {*job.kept} - {*outcome.metrics, *outcome.failed}
    parts += ["kept, since the content is the same"] if kept else []
    parts += ["evaluated again, since the content has changed"] if {*job.kept} - kept else []
    samples = f"{outcome.samples:,} samples" if outcome.samples else "read"
    return f"{one.name}: {samples}{time_taken}; {'; '.join(parts)}"


def _identity(name: str, spec: ModelSpec, precision: str) -> str:
    """Identify a model by its weights and the precision, so that results of other weights are not kept for it."""
    from teachers.open_clip.family import model_identity

    with model_errors(name):
        identity = (
            spec.describe().identity
            if isinstance(spec, TeacherSpec)
            else model_identity(TeacherSpec(model=spec.model, pretrained=spec.pretrained))
        )
    content = json.dumps([identity, precision], sort_keys=True)
    return f"{name}@{hashlib.blake2b(content.encode(), digest_size=8).hexdigest()}"


def _line(job: SetJob, outcome: Outcome, model: str) -> Line:
    one, metrics = job.one, outcome.metrics[model]
    differs = []
    if outcome.samples != one.size:
        differs.append(f"{outcome.samples:,} samples (published: {one.size:,})")
    if one.classes is not None and outcome.classes != one.classes:
        differs.append(f"{outcome.classes} classes (published: {one.classes})")
    refused = f"{len(outcome.refused):,} of {outcome.samples:,} left out: {name_refused(outcome.refused)}"
    return {
        "metrics": {**metrics, "main_metric": metrics[one.main_metric]},
        "content": outcome.content,
        "samples": outcome.samples,
        "notes": [f"{', '.join(differs)}: not comparable"] if differs else [],
        "refused": [refused] if outcome.refused else [],
    }
