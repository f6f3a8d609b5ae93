"""A linear probe: softmax regression from the features of the training images to their classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from reinforce.evaluation.kinds.classification import own_metrics
from reinforce.evaluation.kinds.parts import Features, TwoPartSet, two_part_kind
from reinforce.evaluation.report import Metrics

if TYPE_CHECKING:
    from teachers.runtime.accelerator import Accelerator


class LinearSet(TwoPartSet):
    """A set on which softmax regression learns the classes from the features. Needs no texts."""

    l2: list[Annotated[float, Field(gt=0)]] = Field(
        [1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6],
        min_length=1,
        description="weights of the squared norm; of several, the best one on a held-out fifth of the training part",
    )

    @property
    def scores(self) -> list[str]:
        return ["top1", "top5", "mean_per_class"]

    def fault(self, counts: np.ndarray) -> str | None:
        from reinforce.evaluation.probing import FOLD

        if len(self.l2) == 1 or counts.max() >= FOLD:
            return None
        return (
            f"no class of the training part has {FOLD} usable images, of which one would be held out to choose `l2`: "
            "set `l2` to one number, such as [0.01]."
        )


def _classify(config: TwoPartSet, features: Features, accelerator: Accelerator) -> Metrics:
    import torch

    from reinforce.evaluation.probing import PROBE_BLOCK, fit_probe
    from reinforce.evaluation.ranking import rank_classes

    assert isinstance(config, LinearSet)
    accelerator = accelerator.of_float64("linear probes")
    probe = fit_probe(features.train, features.train_labels, config.l2, accelerator)
    ranked = []
    for start in range(0, len(features.test), PROBE_BLOCK):
        inputs = probe.inputs(accelerator.put(features.test[start : start + PROBE_BLOCK]))
        true = accelerator.put(features.test_labels[start : start + PROBE_BLOCK])
        ranked.append(torch.stack(rank_classes(inputs, probe.weights, true)).cpu().numpy())
    ranks, predicted = np.concatenate(ranked, axis=1)
    return own_metrics(None, None, features.test_labels, ranks, predicted)


KIND = two_part_kind("linear", _classify)
