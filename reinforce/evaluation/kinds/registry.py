"""The table of the kinds of sets. A new kind is a file with its ``KIND``, and a line here."""

from __future__ import annotations

from reinforce.evaluation.kinds import association, choice, classification, index, knn, linear, retrieval, segmentation

_KINDS = (
    classification.KIND, retrieval.KIND, knn.KIND, linear.KIND, index.KIND, association.KIND, choice.KIND,
    segmentation.KIND,
)  # fmt: skip
KINDS = {kind.name: kind for kind in _KINDS}
