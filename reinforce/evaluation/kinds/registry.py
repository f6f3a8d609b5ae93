"""The table of the kinds of sets. A new kind is a file with its ``KIND``, and a line here."""

from __future__ import annotations

from reinforce.evaluation.kinds import agreement, association, classification, index, probes, retrieval, segmentation

_KINDS = (
    classification.KIND, retrieval.RETRIEVAL, probes.KIND, index.KIND, association.KIND, retrieval.CHOICE,
    segmentation.KIND, agreement.KIND,
)  # fmt: skip
KINDS = {kind.name: kind for kind in _KINDS}
