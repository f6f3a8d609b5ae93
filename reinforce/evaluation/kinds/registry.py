"""The table of the kinds of sets. A new kind is a file with its ``KIND``, and a line here."""

from __future__ import annotations

from reinforce.evaluation.kinds import association, choice, classification, retrieval

KINDS = {kind.name: kind for kind in (classification.KIND, retrieval.KIND, association.KIND, choice.KIND)}
