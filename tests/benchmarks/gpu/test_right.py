"""The benchmark's check of results: faults that are smaller than the differences between inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import recipe
from benchmarks.gpu.bench import TINY, Bench
from benchmarks.gpu.sections import right
from benchmarks.pipeline.figures import Figure


def scale(block: torch.nn.Module) -> None:
    for parameter in block.parameters():
        parameter.data.mul_(1.01)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, "cpu", 1, replace(TINY, compared=16))


def inject(monkeypatch: pytest.MonkeyPatch, path: str, fault: Callable[[Any], None]) -> None:
    """Change the models that the project loads; those of the reference stay."""
    load = right.load_model

    def load_with_fault(spec: Any) -> Any:
        model = load(spec)
        fault(model)
        return model

    monkeypatch.setattr(path, load_with_fault)


def unmet(figures: list[Figure]) -> list[str]:
    return [figure.name.partition(":")[0] for figure in figures if figure.met is False]


@pytest.mark.parametrize(
    ("side", "block"),
    [
        ("images", "visual.layer1.0"),
        ("images", "visual.layer4.0"),
        ("texts", "transformer.resblocks.0"),
        ("texts", "transformer.resblocks.1"),
    ],
)
def test_one_block_of_a_teacher_off_by_one_percent_fails_in_each_precision(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, side: str, block: str
) -> None:
    [(name, spec)] = recipe.demo().teachers.items()

    def embed() -> torch.Tensor:
        """What an earlier version compared, with a limit of 0.999: random images, and the same texts."""
        teacher = right.registry.load_model(name, spec, "cpu")
        if side == "texts":
            return teacher.encode_texts(right.texts_of(16))
        return teacher.encode_images(right.pixels_of(teacher.image, 16))

    expected = embed()
    assert unmet(right._compare_embeddings(bench, name, spec)) == []
    inject(monkeypatch, "teachers.open_clip.teacher.load_model", lambda model: scale(model.get_submodule(block)))
    wrong = unmet(right._compare_embeddings(bench, name, spec))
    assert wrong == [f"{name}, {switch}, {side}" for switch in (right.RUNS, "compiled", right.PLAIN, right.EXACT)]
    cosines = embed() @ expected.T
    assert cosines.diagonal().min() > 0.999
    assert torch.equal(cosines.argmax(1), torch.arange(16))


def test_two_rows_that_are_swapped_fail(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    [(name, spec)] = recipe.demo().teachers.items()
    encode = "teachers.open_clip.teacher.OpenClipEncoder.encode_texts"
    plain = right.registry.load_model(name, spec, "cpu").encode_texts
    monkeypatch.setattr(encode, lambda self, texts: plain([texts[1], texts[0], *texts[2:]]))
    assert f"{name}, {right.RUNS}, texts" in unmet(right._compare_embeddings(bench, name, spec))


@pytest.mark.parametrize("block", ["visual.transformer.resblocks.0", "text_decoder.resblocks.0"])
def test_captioner_blocks_off_by_one_percent_fail(bench: Bench, monkeypatch: pytest.MonkeyPatch, block: str) -> None:
    [(name, spec)] = recipe.demo().captioners.items()
    assert unmet(right._compare_logits(bench, name, spec)) == []
    inject(monkeypatch, "teachers.coca.captioner.load_model", lambda model: scale(model.get_submodule(block)))
    assert unmet(right._compare_logits(bench, name, spec)) == [
        f"{name}, {switch}, logits" for switch in (right.RUNS, right.PLAIN, right.EXACT)
    ]
