"""Batches through the models, two of a shard in work, and the order in which shards use the accelerator."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from reinforce.engine.messages import LayerFailure
from reinforce.engine.pulse import LeaseWatch
from reinforce.engine.worker.decode import Decoded, Row
from reinforce.engine.worker.inference import IN_WORK, Inference, run_batches
from reinforce.engine.worker.models import Counters, PriorityLock, encode, to_numpy
from reinforce.source.samples import Refusal
from schemas import Reason
from schemas.seeds import seed_for
from teachers.pixels import to_pixels
from tests.helpers.batches import (
    CONFIG,
    CPU,
    LAYERS,
    Changed,
    Writing,
    make_inference,
    models_of,
    pixels,
    rows,
    text_encoder,
)
from tests.helpers.models import ColorTeacher, WrongShapeTeacher
from tests.helpers.waiting import wait_for


def inference(*names: str, red: ColorTeacher | None = None, counters: Counters | None = None) -> Inference:
    return make_inference(CONFIG, [LAYERS[name] for name in names], models_of(red), counters)


def texts_of(red: ColorTeacher) -> Callable[[Sequence[list[str] | None]], Any]:
    """The encoder of the captions of ``namer``."""
    layer = LAYERS["embeddings/red/namer"]
    return partial(text_encoder(CONFIG, layer, models_of(red)).encode_texts, layer)


def test_a_batch_gives_each_layer_the_outputs_of_its_model_and_a_lease_of_text_layers_only_runs_none() -> None:
    batch = rows(3)
    outputs = inference("embeddings/red/images", "embeddings/blue/images", "captions/namer", "samples").run(
        batch, pixels()
    )
    assert outputs.keys() == {"embeddings/red/images", "embeddings/blue/images", "captions/namer"}
    crops = pixels().crops.reshape(6, 24, 24, 3)
    for name, size, dim, seed in (("red", 16, 8, 0), ("blue", 24, 12, 1)):
        teacher = ColorTeacher(CPU, size, dim, seed)
        expected = teacher.encode_images(to_pixels(torch.from_numpy(crops), teacher.image)).numpy()
        np.testing.assert_allclose(outputs[f"embeddings/{name}/images"], expected.reshape(3, 2, dim), atol=1e-6)
    seeds = [[seed_for(0, row.key, "captions/namer", n) % 1000 for n in range(2)] for row in batch]
    assert [[int(text.rpartition(" ")[2]) for text in texts] for texts in outputs["captions/namer"]] == seeds
    counters = Counters()
    assert inference("embeddings/red/caption", counters=counters).run(rows(3), pixels()) == {}
    assert counters.busy == 0


def test_each_distinct_text_is_encoded_once_in_batches_of_similar_length() -> None:
    batches: list[list[str]] = []
    teacher = Changed(lambda out, texts: batches.append([*texts]) or out)
    texts = [["a", "ccc"], None, ["bb", "a"], [], ["dddd", "ccc"]]
    values, valid = texts_of(teacher)(texts)
    assert batches == [["a", "bb", "ccc"], ["dddd"]]
    assert valid.tolist() == [True, False, True, False, True]
    assert values.shape == (5, 2, 8)
    assert not values[~valid].any()
    for i in (0, 2, 4):
        np.testing.assert_allclose(values[i], ColorTeacher(CPU).encode_texts(texts[i] or []).numpy(), atol=1e-6)


def test_an_error_of_a_model_names_its_layer() -> None:
    wrong = WrongShapeTeacher(CPU)
    message = r"red/images: ValueError: .* have shape \(6, 6\), got \(6, 7\) from WrongShapeTeacher.encode_images"
    with pytest.raises(LayerFailure, match=message):
        inference("embeddings/red/images", red=wrong).run(rows(3), pixels())
    with pytest.raises(
        LayerFailure, match=r"embeddings/red/namer: .* \(1, 6\), got \(1, 7\) from WrongShapeTeacher.encode_t"
    ):
        texts_of(wrong)([["a"]])
    layer = replace(LAYERS["captions/namer"], count=3)
    models = models_of(namer=Writing(lambda texts, *_: [["one"]] * len(texts)))
    with pytest.raises(LayerFailure, match=r"captions/namer: .* must return 3 texts for each of 2 images"):
        make_inference(CONFIG, [layer], models).run(rows(2), pixels())


def test_the_norm_of_every_row_of_embeddings_is_checked_where_it_is_finite() -> None:
    values = torch.nn.functional.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    np.testing.assert_array_equal(to_numpy(values), values.numpy())
    assert to_numpy(values.half()).dtype == np.float32
    to_numpy(values * 1.009)
    for scale in (3.0, 1.011, 0.989, 0.0, 1e30):
        wrong = values.clone()
        wrong[41] *= scale
        with pytest.raises(ValueError, match=rf"norm 1, got {'inf' if scale > 9 else f'{scale:.3f}'} in row 42 of 50"):
            to_numpy(wrong)
        ignored = np.arange(50) == 41
        np.testing.assert_array_equal(to_numpy(wrong, ignored), wrong.numpy())
    for value in (float("nan"), float("inf")):  # these rows are left to the quarantine
        values[2, 1] = value
        np.testing.assert_array_equal(to_numpy(values), values.numpy())
        wrong = torch.cat([values, 3 * values[3:4]])
        with pytest.raises(ValueError, match=r"got 3\.000 in row 51 of 51"):
            to_numpy(wrong)


@pytest.mark.parametrize("layer", ["embeddings/red/images", "embeddings/red/namer"])
def test_a_teacher_whose_norm_changes_after_its_first_batch_fails(layer: str) -> None:
    norms = [1.0]
    teacher = Changed(lambda out, _: out * norms[-1])
    run, encode_texts = inference("embeddings/red/images", red=teacher), texts_of(teacher)

    def encode() -> None:
        run.run(rows(2), pixels()) if layer.endswith("images") else encode_texts([["a", "b"]])

    encode()
    norms.append(3.0)
    with pytest.raises(LayerFailure, match=rf"{layer}: ValueError: embeddings must have norm 1, got 3\.0"):
        encode()


def test_the_norm_of_an_unreadable_images_embedding_is_not_checked() -> None:
    batch = rows(3)
    cells = pixels()
    cells.crops[1] = 0
    of_black_zero = Changed(lambda out, given: out * (given > -1).any(dim=(1, 2, 3))[:, None])
    run = inference("embeddings/red/images", red=of_black_zero)
    with pytest.raises(LayerFailure, match=r"got 0\.000 in row 3 of 6"):
        run.run(batch, cells)
    batch[1] = replace(batch[1], decoded=Decoded(unreadable=Refusal("key1", Reason.IMAGE_BROKEN, "gone")))
    assert not run.run(batch, cells)["embeddings/red/images"][1].any()


# -- models that change their inputs, or reuse the memory of their outputs


def rude(change: Callable[[Any], object], buffer: torch.Tensor, seed: int = 0) -> Changed:
    """A teacher that changes its inputs, and returns views of a buffer for four or more, as captured graphs do."""

    def store(out: torch.Tensor, given: Any) -> torch.Tensor:
        change(given)
        return buffer[: len(out)].copy_(out) if len(out) >= 4 else out

    return Changed(store, seed=seed)


@pytest.mark.parametrize(
    "change",
    [lambda pixels: pixels.mul_(0.5), lambda pixels: pixels.data.mul_(0.5), lambda pixels: pixels.numpy().fill(0)],
    ids=["in place", "data", "array"],
)
@pytest.mark.parametrize("crops", [6, 4], ids=["whole batch", "batch in parts"])
def test_a_teacher_may_change_its_pixels_and_reuse_the_memory_of_its_output(crops: int, change: Any) -> None:
    first, second = pixels(), pixels()
    second.crops[:] = 255 - second.crops

    def run(red: ColorTeacher, blue: ColorTeacher) -> list[Any]:
        models = models_of(red, blue=blue)
        models.batches._bounds["crops"] = crops
        shard = make_inference(CONFIG, [LAYERS[f"embeddings/{name}/images"] for name in ("red", "blue")], models)
        return [shard.run(rows(3), first), shard.run(rows(3), second)]

    buffer = torch.empty(64, 8)
    found, right = run(rude(change, buffer), rude(change, buffer, 1)), run(ColorTeacher(CPU), ColorTeacher(CPU, seed=1))
    for mine, theirs in zip(found, right, strict=True):
        for name in theirs:
            np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_copying_what_a_model_returns_starts_no_threads() -> None:
    def started() -> set[str]:
        before = set(os.listdir("/proc/self/task"))
        copies.append(encode(model, "encode_images", torch.zeros(1), len(embeddings)))
        return set(os.listdir("/proc/self/task")) - before

    copies: list[torch.Tensor] = []
    embeddings = torch.ones(1, 512).expand(4096, -1)
    model = SimpleNamespace(dim=512, encode_images=lambda pixels: embeddings)
    computing = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(1) as fresh:  # torch starts threads for each thread that computes
            assert fresh.submit(started).result() == set()
    finally:
        torch.set_num_threads(computing)
    assert torch.equal(copies[0], embeddings)


def test_a_teacher_may_change_its_list_of_texts_and_reuse_the_memory_of_its_output() -> None:
    layer = LAYERS["embeddings/red/namer"]
    config = CONFIG.model_copy(update={"workers": CONFIG.workers.model_copy(update={"batch": 4})})
    texts = [["a", "bb"], ["ccc", "dddd"], ["eeeee", "ffffff"], ["ggggggg", "hhhhhhhh"]]
    found = text_encoder(config, layer, models_of(rude(list.clear, torch.empty(64, 8)))).encode_texts(layer, texts)[0]
    np.testing.assert_allclose(found, texts_of(ColorTeacher(CPU))(texts)[0], atol=1e-6)


def test_captions_do_not_change_when_a_captioner_reuses_the_lists_that_it_returns() -> None:
    kept: list[list[str]] = [[], [], []]

    def reuse(new: list[list[str]], *_: Any) -> list[list[str]]:
        for row, texts in zip(kept, new, strict=True):
            row[:] = texts
        return kept

    models = (models_of(namer=Writing(reuse)), models_of())
    runs = [make_inference(CONFIG, [LAYERS["captions/namer"]], one) for one in models]
    cells = pixels()
    batches = [rows(3), [replace(row, key=f"other {row.key}") for row in rows(3)]]
    found, right = ([run.run(batch, cells) for batch in batches] for run in runs)
    assert found == right


def numbered(count: int) -> list[Row]:
    return [Row(f"{number}", None) for number in range(count)]


def keys(batch: list[Row]) -> str:
    return "".join(row.key for row in batch)


def test_batches_are_yielded_in_order_and_the_end_gets_all_rows() -> None:
    with ThreadPoolExecutor(IN_WORK) as threads:
        batches = run_batches(threads, lambda: 2, LeaseWatch("a"), numbered(5), keys, keys)
        found = [(keys(batch), result) for batch, result in batches]
    assert found == [("01", "01"), ("23", "23"), ("4", "4"), ("", "01234")]


def test_the_older_of_two_shards_keeps_the_accelerator_between_its_batches() -> None:
    lock, used, started = PriorityLock(), "", threading.Event()

    def shard(name: str, order: int) -> None:
        def run(batch: list[Row]) -> None:
            nonlocal used
            with lock.take(order):
                started.set()
                while name == "a" and keys(batch) != "3" and not any(order == 1 for order, _ in lock._waiting):
                    time.sleep(0.001)
                used += name

        with ThreadPoolExecutor(IN_WORK) as threads:
            for _ in run_batches(threads, lambda: 1, LeaseWatch(name), numbered(4), run, lambda _: None):
                time.sleep(0.005)  # the texts of a batch, while the next one waits for its turn

    with ThreadPoolExecutor(2) as threads:
        older = threads.submit(shard, "a", 1)
        assert started.wait(600)
        threads.submit(shard, "b", 2).result()
        older.result()
    assert used == "aaaabbbb"


def test_an_error_arrives_once_no_batch_is_in_work() -> None:
    working, ended = threading.Event(), threading.Event()

    def run(batch: list[Row]) -> None:
        if keys(batch) == "0":
            assert working.wait(600)
            raise ValueError("odd")
        working.set()
        time.sleep(0.1)
        ended.set()

    with pytest.raises(ValueError, match="odd"), ThreadPoolExecutor(IN_WORK) as threads:
        list(run_batches(threads, lambda: 1, LeaseWatch("a"), numbered(3), run, lambda _: None))
    assert ended.is_set()


def test_the_oldest_waiting_shard_gets_the_lock_first_also_after_an_error() -> None:
    lock, order = PriorityLock(), []
    assert [next(lock.orders) for _ in range(3)] == [1, 2, 3]
    with contextlib.suppress(ZeroDivisionError), lock.take(9):
        raise ZeroDivisionError

    def use(number: int) -> None:
        with lock.take(number):
            order.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in (5, 3, 4, 3)]
    with lock.take(9):
        for thread in threads:
            thread.start()
        wait_for(lambda: lock.waiting == 4)
    for thread in threads:
        thread.join(600)
    assert order == [3, 3, 4, 5]
