"""Captions and embeddings at the same time, on streams of their own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from reinforce.config import parse_config
from reinforce.dataset.files.store import Store
from reinforce.engine.inference.inference import Inference
from reinforce.engine.inference.models import Counters, Models, load_models
from reinforce.engine.inference.self_test import check_models, precisions
from reinforce.engine.messages.results import ShardResult
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.worker.shard import process_shard
from teachers.coca.captioner import CocaCaptioner
from teachers.device import process_flags
from teachers.device.accelerator import Accelerator
from teachers.device.step_graphs import GraphedSteps
from tests.engine.test_inference import CONFIG, LAYERS, pixels, rows
from tests.helpers.data import config_of, members_of, tree, write_tar
from tests.helpers.decoding import decode_pool
from tests.helpers.models import ColorTeacher, SeedCaptioner
from tests.helpers.stand_in_cuda import StandIn, stand_in_cuda
from tests.helpers.tiny_coca import coca_model

SECONDS = 120.0
NAMES = ("embeddings/red/images", "captions/namer")


@pytest.fixture
def cuda() -> Iterator[StandIn]:
    with stand_in_cuda() as cuda:  # raises where a stream does not wait for another one
        yield cuda


def test_shards_in_two_lanes_have_the_bytes_of_shards_in_one(
    tmp_path: Path, cuda: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        write_tar(tmp_path / "source" / f"{number}.tar", members_of(number, 5))
    captioner = {"model": coca_model(tmp_path / "coca"), "captions": 2, "max_length": 7, "precision": "fp32"}
    streams = dict[str, set[Any]](teacher=set(), captures=set(), encode=set())
    capture, encode = GraphedSteps._capture, ColorTeacher.encode_images

    def capturing(self: GraphedSteps, *arguments: Any) -> Any:
        assert not process_flags.are_shared(), "torch changes flags here"
        streams["captures"].add(torch.cuda.current_stream())
        return capture(self, *arguments)

    def encoding(self: ColorTeacher, images: torch.Tensor) -> torch.Tensor:
        streams["teacher"].add(torch.cuda.current_stream())
        return encode(self, images)

    def encoding_for_captions(self: CocaCaptioner, images: torch.Tensor) -> torch.Tensor:
        streams["encode"].add(torch.cuda.current_stream())
        return encode_for_captions(self, images)

    encode_for_captions = CocaCaptioner.encode
    monkeypatch.setattr(CocaCaptioner, "encode", encoding_for_captions)
    monkeypatch.setattr(GraphedSteps, "_capture", capturing)
    monkeypatch.setattr(ColorTeacher, "encode_images", encoding)

    def run(overlap: bool) -> tuple[list[ShardResult], Models]:
        config = parse_config(
            config_of(
                f"{tmp_path}/source/*.tar",
                tmp_path / f"overlap-{overlap}",
                captioners={"coca": captioner},
                teachers={"red": {"class": "tests.helpers.models:ColorTeacher", "logit_scale": 30.0}},
                workers={"batch": 6, "max": 1, "gpus": 1, "overlap": overlap},
            )
        )
        plan, store = make_plan(config), Store(config.output)
        models = load_models(config, plan.layers.values())
        check_models(models, plan.layers.values(), precisions(config))
        with ThreadPoolExecutor(2) as leases:
            work = [
                leases.submit(process_shard, shard, config, plan.layers, store, models, decode_pool(), 8)
                for shard in plan.pending
            ]
            return [future.result(300) for future in work], models

    expected, _ = run(False)
    streams["captures"].clear()
    streams["encode"].clear()
    found, models = run(True)
    assert tree(tmp_path / "overlap-True") == tree(tmp_path / "overlap-False")
    assert [result.notes for result in found] == [(), ()]
    assert streams["teacher"] == {torch.cuda.default_stream()}
    assert streams["captures"] == {models.lanes._stream}
    assert streams["encode"] == {torch.cuda.default_stream(), models.lanes._stream}, "the second in the self-test"
    assert sum(result.busy for result in found) == pytest.approx(models.counters.busy)
    for one, other in zip(expected, found, strict=True):
        assert one.stages.keys() == other.stages.keys()


class MeetingTeacher(ColorTeacher):
    """Encodes the first batch, and the others while a captioner is at work."""

    def __init__(self, captioning: threading.Event, encoded: threading.Event) -> None:
        super().__init__(torch.device("cuda"))
        self.captioning, self.encoded, self.batches = captioning, encoded, 0

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        self.batches += 1
        if self.batches > 1:
            assert self.captioning.wait(SECONDS)
            self.encoded.set()
        return super().encode_images(pixels)


class MeetingCaptioner(SeedCaptioner):
    """Ends its first batch after the teacher has encoded the second one."""

    def __init__(self, captioning: threading.Event, encoded: threading.Event) -> None:
        super().__init__(torch.device("cuda"))
        self.captioning, self.encoded = captioning, encoded
        self.stream: Any = None

    def caption(self, pixels: torch.Tensor, seeds: Any) -> list[list[str]]:
        self.stream = torch.cuda.current_stream()
        self.captioning.set()
        assert self.encoded.wait(SECONDS)
        return super().caption(pixels, seeds)


def test_captions_are_written_while_a_teacher_encodes_the_next_batch(cuda: StandIn) -> None:
    events = threading.Event(), threading.Event()
    teacher, captioner = MeetingTeacher(*events), MeetingCaptioner(*events)
    models = Models({"red": teacher}, {"namer": captioner}, Accelerator("cuda"))
    models.overlap()
    inference = Inference(CONFIG, [LAYERS[name] for name in NAMES], models, Counters())
    with ThreadPoolExecutor(2) as threads:
        batches = [threads.submit(inference.run, rows(3), pixels()) for _ in range(2)]
        one, other = (batch.result(2 * SECONDS) for batch in batches)
    assert captioner.stream is not torch.cuda.default_stream()
    assert one[NAMES[1]] == other[NAMES[1]]
    on_cpu = Models(
        {"red": ColorTeacher(torch.device("cpu"))}, {"namer": SeedCaptioner(torch.device("cpu"))}, Accelerator("cpu")
    )
    expected = Inference(CONFIG, [LAYERS[name] for name in NAMES], on_cpu, Counters()).run(rows(3), pixels())
    assert one[NAMES[1]] == expected[NAMES[1]]


class LargeCaptioner(SeedCaptioner):
    """Needs the memory that a teacher holds in the other lane."""

    def __init__(self, models: list[Models], largest: int) -> None:
        super().__init__(torch.device("cuda"))
        self.models, self.largest, self.sizes = models, largest, list[int]()

    def caption(self, pixels: torch.Tensor, seeds: Any) -> list[list[str]]:
        self.sizes.append(len(pixels))
        if self.models[0].lanes.overlap or len(pixels) > self.largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().caption(pixels, seeds)


def test_lanes_take_turns_before_a_batch_is_halved(cuda: StandIn) -> None:
    for largest, sizes in ((3, [3, 3]), (1, [3, 3, 1, 1, 1])):
        holder: list[Models] = []
        captioner = LargeCaptioner(holder, largest)
        models = Models({"red": ColorTeacher(torch.device("cuda"))}, {"namer": captioner}, Accelerator("cuda"))
        holder.append(models)
        models.overlap()
        inference = Inference(CONFIG, [LAYERS[name] for name in NAMES], models, Counters())
        assert [len(texts) for texts in inference.run(rows(3), pixels())[NAMES[1]]] == [2, 2, 2]
        assert captioner.sizes == sizes
        notes = models.batches.take_notes()
        assert "at the same time; from now on they take turns. Cause: OutOfMemoryError" in notes[0]
        assert len(notes) == 1 + (largest == 1), "one that lanes take turns, and one that the batch was halved"


def test_memory_of_a_lane_that_another_one_has_not_waited_for_is_noticed(
    cuda: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = Models(
        {"red": ColorTeacher(torch.device("cuda"))}, {"namer": SeedCaptioner(torch.device("cuda"))}, Accelerator("cuda")
    )
    models.overlap()
    monkeypatch.setattr(Accelerator, "wait_for_copies", lambda self, tensors: None)
    inference = Inference(CONFIG, [LAYERS[NAMES[1]]], models, Counters())
    with pytest.raises(RuntimeError, match="race"):
        inference.run(rows(3), pixels())
    made = torch.ones(3, device="cuda")
    take = models.accelerator.hand_over(made + 1)
    later = made + 2
    with torch.cuda.stream(models.lanes._stream):
        assert take().sum().item() == 6
        with pytest.raises(RuntimeError, match="race"):
            later.sum()
    cuda.races.at_release.clear()
