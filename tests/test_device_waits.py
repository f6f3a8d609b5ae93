"""How often a shard and a training step wait for a device, on a stand-in for CUDA.

It computes on the CPU in the order of the program, so a pass does not show that CUDA has the kernels, their rounding
and speed, work of two streams at the same time, and waits inside of torch's own C++ code; see
``tests.helpers.stand_in_cuda``.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from reinforce.config import parse_config
from reinforce.dataset.store import Store
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.worker.actor import find_batch
from reinforce.engine.worker.models import load_models
from reinforce.engine.worker.shard import ShardProcess, allocate_pixels
from reinforce.student.train import train
from reinforce.training import loop
from reinforce.training.step import StepOutput
from teachers.fast_paths.usage import set_enabled, snapshot
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.decoding import decode_pool
from tests.helpers.models.tiny_coca import coca_model
from tests.helpers.models.tiny_models import open_clip_model, transformers_siglip
from tests.helpers.real_sizes import RAISING
from tests.helpers.reinforced import reinforce_here, small_dataset
from tests.helpers.stand_in_cuda import Counts, StandIn, stand_in_cuda
from tests.helpers.students import student_folder

# For each batch of images with its texts, without decoding: one for the output of each model.
WAITS_A_BATCH = 6
# Reads the norm of the gradient.
WAITS_A_STEP = 1


def test_a_shard_on_a_gpu_is_that_of_a_cpu_and_waits_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "source" / "0.tar", members_of(0, 12))

    def config(output: str, gpus: int) -> dict[str, Any]:
        return config_of(
            f"{tmp_path}/source/*.tar",
            tmp_path / output,
            captioners={
                "coca": {"model": coca_model(tmp_path / "coca"), "captions": 2, "max_length": 8, "precision": "fp32"}
            },
            teachers={
                "vit": {"model": open_clip_model(tmp_path / "vit"), "precision": "fp32"},
                "siglip": {
                    "model": transformers_siglip(tmp_path / "siglip"),
                    "family": "transformers",
                    "precision": "fp32",
                },
            },
            workers={"batch": 8, "max": 1, "gpus": gpus},  # three batches
        )

    here = reinforce_here(config("cpu", 0))
    parsed, pool = parse_config(config("cuda", 1)), decode_pool()
    plan = make_plan(parsed)
    monkeypatch.setattr(pool, "_regions", [])  # those of other tests are not pinned
    with stand_in_cuda() as cuda:
        models = load_models(parsed, plan.layers.values())
        find_batch(models, parsed, [plan.layers["captions/coca"]])
        assert models.loaded["captioners"]["coca"]._decoder.capacity == 1024, "of a large row group, to test its memory"
        allocate_pixels(pool, parsed, plan.layers.values(), models, 1)
        with cuda.counted() as counts:
            ShardProcess(plan.pending[0], parsed, plan.layers, Store(parsed.output), models, pool, 8).run()
    images = [copy for copy in counts.copies_to_device() if copy.place.startswith("teachers/runtime/accelerator.py")]
    assert images
    assert not any(copy.blocking for copy in images), images
    decoding = ("teachers/coca/", "teachers/decoding/", "teachers/fast_paths/recompilation.py")  # which captures once
    waits = sum(count for wait, count in counts.waits.items() if not any(part in wait for part in decoding))
    assert waits <= WAITS_A_BATCH * 3, counts
    for path in sorted((tmp_path / "cuda").rglob("*.parquet")):
        found, expected = pq.read_table(path), pq.read_table(Path(here) / path.relative_to(tmp_path / "cuda"))
        if "embeddings" in path.parts:  # CUDA's convolutions are channels-last, which rounds otherwise
            near = [np.array(table.column(1).combine_chunks().storage.flatten()) for table in (found, expected)]
            np.testing.assert_allclose(*(values.astype(np.float32) for values in near), atol=2e-3)
        else:
            assert found.equals(expected), path


def test_a_step_on_a_gpu_has_the_loss_of_a_cpu_and_waits_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teachers = {"vit": {"model": open_clip_model(tmp_path / "vit"), "logit_scale": 20.0}}
    dataset = small_dataset(tmp_path, (16,), teachers=teachers)
    config = {
        "student": {"model": student_folder(tmp_path / "student")},
        "data": {"datasets": dataset, "workers": 0, "window": 12},
        "loss": {"lambda": 0.7},
        "train": {"steps": 9, "batch": 8, "optimizer": {"warmup": 1}, "ema": 0.9},
    }
    losses, _ = _three_steps(monkeypatch, {**config, "output": str(tmp_path / "on-cpu")})
    with stand_in_cuda() as cuda:
        set_enabled(True)
        monkeypatch.setattr(loop, "_LEAST_COMPILED", 9)
        found, steps = _three_steps(monkeypatch, {**config, "output": str(tmp_path / "on-cuda")}, cuda)
    assert ("the trained model", "compile") in {(one.model, one.path) for one in snapshot()}, "by default"
    assert found == pytest.approx(losses, rel=1e-5)
    for counts, in_use in steps[1:]:  # the first makes the optimizer's state
        assert counts.synchronizations <= WAITS_A_STEP, counts
        assert not any(copy.blocking for copy in counts.copies if copy.bytes > 64), counts
        assert in_use < 1.01 * steps[0][1]
        assert not RAISING & counts.by_name.keys(), "strict determinism ends the training"


def _three_steps(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], cuda: StandIn | None = None
) -> tuple[list[float], list[tuple[Counts, int]]]:
    """The losses of a training, what each step has counted, and the memory in use after it.

    The training is interrupted then, since its checkpoint, its evaluation and its export would take longer.
    """
    losses: list[Any] = []
    steps: list[tuple[Counts, int]] = []
    compute, run = loop.backpropagate, loop._Loop._step

    def watched(*arguments: Any) -> StepOutput:
        output = compute(*arguments)
        losses.append(sum(output.losses.values()))
        return output

    def counted(*arguments: Any) -> int:
        if len(steps) == 3:
            raise KeyboardInterrupt
        with cuda.counted() if cuda else contextlib.nullcontext(Counts()) as counts:
            signum = run(*arguments)
        steps.append((counts, cuda.allocated if cuda else 0))
        return signum

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(loop, "backpropagate", watched)
        patch.setattr(loop._Loop, "_step", counted)
        train(config)
    return [float(loss) for loss in losses[-3:]], steps  # after those of a plain and of a compiled step
