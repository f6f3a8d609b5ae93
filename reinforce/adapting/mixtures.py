"""Mixtures of weights, evaluated on the sets of a config; results are kept in a file, and none is computed twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from reinforce.adapting.mixing import Mixer, load_mixer
from reinforce.errors import UserError
from reinforce.evaluation.config import Evaluation
from reinforce.evaluation.encoding import Models
from reinforce.evaluation.evaluator import Evaluator
from reinforce.processes.cores import available_cores
from reinforce.storage import Storage
from teachers.open_clip.teacher import OpenClipEncoder
from teachers.redact import redact_values
from teachers.runtime.accelerator import Accelerator, Precision
from teachers.spec import ModelSpec

KEPT = "mixtures.json"
SWEEP, SOUP = "sweep.json", "soup.json"
_MODEL = "open_clip_config.json"


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
            "sets": redact_values(
                evaluation.model_dump(mode="json", exclude={"every", "best", "export", "threads", "memory"})
            ),
            "precision": self._accelerator.precision,
        }
        if kept is not None and (kept.get("of") != self._of or not _are_results(kept.get("mixtures"))):
            raise UserError(f"{self._storage.url} has results of other models or sets. Name another folder.")
        self._storage.check_writable()
        self._results: list[dict[str, Any]] = [] if kept is None else kept["mixtures"]
        self._evaluator = Evaluator(evaluation.model_copy(update={"threads": evaluation.threads or available_cores()}))

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

    def loaded(self, weights: Mapping[str, float]) -> Models:
        """The mean of some models with weights, in eval mode, to encode images and texts."""
        self.mixer.use({name: weight for name, weight in weights.items() if weight})
        student = self.mixer.student
        model = self._accelerator.place(student.clip.eval())
        encoder = OpenClipEncoder(model, student.image, self.mixer.tokenizer, self._accelerator)
        config = self._evaluator.config
        return Models({"model": encoder}, self._accelerator, config.batch, config.threads or available_cores())

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


def _are_results(kept: Any) -> bool:
    """Whether a value of ``mixtures.json`` is a list of mixtures with their metrics."""
    return isinstance(kept, list) and all(
        isinstance(one, dict) and isinstance(one.get(key), dict) for one in kept for key in ("weights", "metrics")
    )


def check_free(storage: Storage) -> None:
    """Raise UserError if a folder has a model."""
    if storage.read_json(_MODEL) is not None:
        raise UserError(f"{storage.url} has a model. Name another folder, or remove it.")


def percent(value: float | None) -> str:
    """A metric in percent, empty if there is none."""
    return "" if value is None else f"{100 * value:.2f}"
