"""Scores: a struct of some numbers a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

import schemas
from reinforce.config import Config, Score
from reinforce.dataset.layers import (
    SAMPLES,
    TRUE_CAPTION,
    Layer,
    LayerKind,
    compute_fingerprint,
    inputs_of,
    mapping_at,
    model_of,
    scores_layer,
)
from reinforce.dataset.scoring.base import Scorer
from reinforce.dataset.scoring.facts import Facts
from reinforce.dataset.scoring.head import Head
from reinforce.dataset.scoring.similarity import Similarity
from reinforce.errors import UserError

if TYPE_CHECKING:
    from teachers.spec import ModelInfo

_WIDTH = 4
#: The scorers by the key of a config that chooses them.
SCORERS: dict[str, type[Scorer]] = {scorer.key: scorer for scorer in (Similarity, Head, Facts)}


def make_scorer(spec: Score, captions: int = 1, version: int | None = None) -> Scorer:
    """The scorer of an entry of ``scores``, by a ``version`` or that of new layers of a dataset with at most
    ``captions`` true captions a sample. Raises ValueError or OSError that names the fix."""
    scorer = next(scorer for key, scorer in SCORERS.items() if getattr(spec, key) is not None)
    return scorer(spec, version or scorer.version_for(spec, captions))


class Scores(LayerKind):
    name = "scores"
    pattern = scores_layer("*")
    level = 3
    columns = ("key", "scores")
    values = None  # a score is null where one of its inputs is, which says why in the quarantine of its layer
    unit = "samples"
    producer = "scores:Scores"
    section = "scores"
    required = ("names", "needs", "score")

    def layers(
        self, config: Config, infos: Mapping[tuple[str, str], ModelInfo], known: Mapping[str, Layer]
    ) -> Iterable[Layer]:
        for name, spec in config.scores.items():
            info = infos.get((self.section, name))
            if info is not None:
                identity, names, inputs = info.identity, tuple(info.identity["names"]), info.identity["inputs"]
                wanted = tuple(one for one in inputs if "/" in one)
            else:
                try:
                    scorer = make_scorer(spec, config.input.captions_per_sample or 1)
                    identity, names, wanted = scorer.identity(), scorer.names, scorer.needs
                    inputs = (*wanted, *scorer.columns)
                except (ValueError, OSError) as error:
                    raise UserError(f"scores.{name}: {error}") from error
            if TRUE_CAPTION in map(inputs_of, inputs):
                config.input.require_captions(f"scores.{name}")
            missing = [need for need in wanted if need not in known]
            for need in missing:
                if model_of(need) in config.teachers and (side := inputs_of(need)) in ("images", TRUE_CAPTION):
                    what = "images" if side == "images" else "texts"
                    raise UserError(f"scores.{name}: teacher {model_of(need)} encodes no {what}. Name one that does.")
            if missing:
                raise UserError(
                    f"scores.{name}: {', '.join(missing)} is no layer of this config. Name its teacher in `teachers`, "
                    "and the captioner of its texts in `captioners`."
                )
            needs = (SAMPLES, *wanted)
            recipe = _recipe({need: known[need].fingerprint for need in needs}, identity)
            yield Layer(
                name=scores_layer(name),
                kind=self,
                fingerprint=compute_fingerprint(recipe),
                needs=needs,
                model=None if info is None else name,
                names=names,
                recipe=recipe,
                code=None if info is None else info.code,
                sees="image" if info is not None and info.images else None,
            )

    def as_recorded(self, layer: Layer, entry: Mapping[str, Any]) -> tuple[Layer, str | None]:
        score, recorded = layer.recipe["score"], mapping_at(entry, "score")
        earlier = next((scorer.earlier for key, scorer in SCORERS.items() if key in score), {})
        version: Any = recorded.get("version")
        if version not in earlier or version == score["version"] or recorded != {**score, "version": version}:
            return layer, None
        recipe = _recipe(layer.recipe["sources"], recorded)
        return replace(layer, recipe=recipe, fingerprint=compute_fingerprint(recipe)), earlier[version]

    def inputs(self, name: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(entry.get("needs") or (SAMPLES,))

    def schema(self, layer: Layer, images: str) -> pa.Schema:
        return schemas.scores_schema(layer.names)

    def row_bytes(self, layer: Layer, sample: float) -> float | None:
        return len(layer.names) * _WIDTH

    def entry(self, layer: Layer, stated: Mapping[str, Any]) -> dict[str, Any]:
        return {"names": [*layer.names], "needs": [*layer.needs], "score": layer.recipe["score"]}

    def recorded_fingerprint(self, layer: Layer, manifest: Mapping[str, Any]) -> str | None:
        entry, layers = mapping_at(manifest, "layers", layer.name), manifest["layers"]
        if not all(need in layers for need in layer.needs):
            return None
        return compute_fingerprint(_recipe({need: layers[need]["fingerprint"] for need in layer.needs}, entry["score"]))

    def recipes(self, layer: Layer, manifest: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        before = mapping_at(manifest, "layers", layer.name, "score")
        return dict(before), dict(layer.recipe["score"]) if before else {}

    def wrong_rows(self, layer: Layer, table: pa.Table, records: int | None) -> Iterator[tuple[str, Any]]:
        expected = self.schema(layer, "").field("scores").type
        if table["scores"].type != expected:
            found = f"{table['scores'].type}, dataset.json states {expected}"
            yield f"have scores of type {found}", np.ones(table.num_rows, np.bool_)
            return
        for name in layer.names:
            wrong = pc.invert(pc.is_finite(pc.struct_field(table["scores"], name)))
            yield f"have a score {name} that is NaN or infinite", pc.fill_null(wrong, False).to_numpy()

    def decode(self, table: pa.Table) -> list[dict[str, float | None]]:
        found: list[dict[str, float | None]] = table["scores"].to_pylist()
        return found

    def numbers(self, table: pa.Table) -> Mapping[str, npt.NDArray[np.float32]]:
        scores = table["scores"].combine_chunks()
        names = [field.name for field in scores.type]
        return {name: pc.fill_null(one, np.nan).to_numpy() for name, one in zip(names, scores.flatten(), strict=True)}

    def content(self, layer: Layer) -> str:
        return ", ".join(layer.names)


def _recipe(sources: Mapping[str, str], score: Mapping[str, Any]) -> dict[str, Any]:
    """What the fingerprint covers: those of the layers it is computed from, and the identity of the scorer."""
    return {"sources": dict(sources), "score": dict(score)}
