"""Config of evaluations: sets of the user by name, and published sets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from reinforce.errors import UserError
from reinforce.evaluation.kinds.agreement import AgreementSet
from reinforce.evaluation.kinds.base import OwnSet, SetKind, ZeroShotSet
from reinforce.evaluation.kinds.index import IndexSet
from reinforce.evaluation.kinds.probes import ProbeSet
from reinforce.evaluation.kinds.registry import KINDS
from reinforce.evaluation.kinds.retrieval import RetrievalSet
from reinforce.evaluation.kinds.segmentation import SegmentationSet
from reinforce.evaluation.registry import Suite, SuiteSet, select_sets
from reinforce.settings import ImagesFrom, OneOrMore, Section, keys_match
from reinforce.source.config import LIMITS, NamedLimits

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

#: Assumed images of a set of the user's, until it is opened: those of ImageNet.
_IMAGES = 50_000


def _check_set_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a set: use letters, digits, '.', '_' and '-'")
    return name


SetName = Annotated[str, AfterValidator(_check_set_name)]
_SET_NAMES = keys_match(f"^{_NAME.pattern}$")


class Evaluation(Section):
    """Sets by name, and how often they are evaluated during training (always at its end)."""

    place = "evaluate"

    every: int | None = Field(
        None, ge=1, description="steps between evaluations; default: only at the end, and at the start of a fine-tuning"
    )
    zero_shot: Annotated[dict[SetName, ZeroShotSet], _SET_NAMES] = Field(
        default_factory=dict, description="classification sets by name"
    )
    retrieval: Annotated[dict[SetName, RetrievalSet], _SET_NAMES] = Field(
        default_factory=dict, description="retrieval sets by name"
    )
    probes: Annotated[dict[SetName, ProbeSet], _SET_NAMES] = Field(
        default_factory=dict,
        description="sets by name on which nearest neighbours and a linear probe learn from features; no texts",
    )
    index: Annotated[dict[SetName, IndexSet], _SET_NAMES] = Field(
        default_factory=dict, description="sets by name on which models query the vectors of a teacher with their own"
    )
    segmentation: Annotated[dict[SetName, SegmentationSet], _SET_NAMES] = Field(
        default_factory=dict, description="segmentation sets by name, which need no texts"
    )
    agreement: Annotated[dict[SetName, AgreementSet], _SET_NAMES] = Field(
        default_factory=dict, description="reinforced datasets by name, with whose teachers models are compared"
    )
    suite: Suite | None = Field(
        None, description="a suite of published sets, evaluated as by `reinforce evaluate --suite`"
    )
    data: str | None = Field(
        None, description="folder or URL with the sets of `suite`; hf:// reads them where they are published"
    )
    sets: OneOrMore | None = Field(None, description="sets of `suite` by key; default: all")
    best: str | None = Field(
        None,
        description="metric that selects the best checkpoint, e.g. zero_shot/NAME/top1; higher is better, and the "
        "earlier of two equal ones is kept; default: top1 of the first zero-shot set, else text_to_image/r1 of the "
        "first retrieval set, else SUITE/mean, unless this is of a part of the set or suite",
    )
    export: Literal["last", "best"] = Field(
        "last", description="weights that a training exports: of its last step, or of its best evaluated one by `best`"
    )
    batch: int = Field(256, ge=1, description="images or texts in one forward pass")
    memory: int = Field(
        2 * 2**30,
        ge=0,
        description="bytes of decoded images kept between evaluations; a set that does not fit is decoded each time",
    )
    images_from: ImagesFrom = None
    limits: NamedLimits = LIMITS["standard"]

    @property
    def own_sets(self) -> dict[str, tuple[SetKind, OwnSet]]:
        """The sets of the user, each with its kind, by ``SECTION/NAME``."""
        kinds = [kind for kind in KINDS.values() if kind.section]
        return {
            f"{kind.section}/{name}": (kind, one) for kind in kinds for name, one in getattr(self, kind.section).items()
        }

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics of the sets, in order; all are between 0 and 1, and higher is better."""
        names = [f"{name}/{score}" for name, (_, one) in self.own_sets.items() for score in one.scores]
        if self.suite is not None:
            names += [f"{self.suite}/mean", *(f"{self.suite}/{one.key}/{one.main_metric}" for one in self.suite_sets)]
        return names

    @property
    def suite_sets(self) -> list[SuiteSet]:
        """The chosen sets of the suite."""
        return [] if self.suite is None else select_sets(self.suite, self.sets or ())

    def shares(self, ranks: int) -> list[frozenset[str]]:
        """Names of sets by rank, such that each has about equally many images."""
        sizes = {name: one.size or _IMAGES for name, (_, one) in self.own_sets.items()}
        sizes |= {f"{self.suite}/{one.key}": one.size for one in self.suite_sets}
        shares: list[set[str]] = [set() for _ in range(ranks)]
        images = [0] * ranks
        for name in sorted(sizes, key=lambda name: -sizes[name]):
            least = images.index(min(images))
            shares[least].add(name)
            images[least] += sizes[name]
        return [frozenset(share) for share in shares]

    def combine(self, parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """The metrics of shares, in order, with the mean of the suite if it is whole. Sets that failed have none."""
        found = {name: score for part in parts for name, score in part.items()}
        if self.suite is not None:
            scores = [found.get(f"{self.suite}/{one.key}/{one.main_metric}") for one in self.suite_sets]
            known = [score for score in scores if score is not None]
            if len(known) == len(scores):
                found[f"{self.suite}/mean"] = sum(known) / len(known)
        return {name: found[name] for name in self.metrics if name in found}

    def parts(self, sets: Mapping[str, str]) -> dict[str, str]:
        """The evaluated part of a set or suite, by metric; metrics of the whole are left out.

        ``sets`` says it of sets, such as ``151 of 301 images`` of ``zero_shot/NAME``.
        """
        found = {
            metric: part for metric in self.metrics for name, part in sets.items() if metric.startswith(f"{name}/")
        }
        if self.suite is not None:
            sizes = len(self.suite_sets), len(select_sets(self.suite))
            partly = sum(f"{self.suite}/{one.key}" in sets for one in self.suite_sets)
            if partly or sizes[0] < sizes[1]:
                among = f" with {partly} in part" if partly else ""
                found[f"{self.suite}/mean"] = f"{sizes[0]} of {sizes[1]} sets{among}"
        return found

    @property
    def best_metric(self) -> str | None:
        """The metric that selects the best checkpoint; None without sets."""
        return self.best or next(iter(self.metrics), None)

    @model_validator(mode="after")
    def _check_suite(self) -> Evaluation:
        if (self.suite is None) != (self.data is None) or (self.sets is not None and self.suite is None):
            raise ValueError("suite, data: set both, and `sets` only with them; `data` is where the suite's sets are")
        try:
            self.suite_sets  # noqa: B018
        except UserError as error:
            raise ValueError(str(error).replace("--sets", "sets")) from error
        return self

    @model_validator(mode="after")
    def _check_best(self) -> Evaluation:
        if self.best is not None and self.best not in self.metrics:
            known = ", ".join(self.metrics) or "none, since there are no sets"
            raise ValueError(f"best: no set gives {self.best!r}; the metrics are: {known}")
        if self.export == "best" and not self.metrics:
            raise ValueError("export: best needs a set to evaluate on; add one, or remove `export`")
        metric = (self.best_metric or "") if self.export == "best" and self.best is None else ""
        if part := metric and self.parts({}).get(metric):
            raise ValueError(f"export: best would choose by {metric} of {part}; set `best` to the metric that chooses")
        return self
