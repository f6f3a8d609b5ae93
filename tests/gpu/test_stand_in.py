"""Little memory on a stand-in for CUDA, and what runs on one for a GPU of Apple, which has no float64."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reinforce.config import Config, parse_config
from reinforce.dataset.store import Store
from reinforce.engine.plan.plan import Plan, make_plan
from reinforce.engine.worker import actor as full_batch
from reinforce.engine.worker.actor import find_batch
from reinforce.engine.worker.models import LoadedModels, load_models
from reinforce.engine.worker.producers.registry import measure_costs
from reinforce.engine.worker.shard import ShardProcess
from reinforce.errors import UserError
from reinforce.evaluation.kinds import probes
from reinforce.evaluation.kinds.probes import PartFeatures
from reinforce.images.device import augment
from reinforce.images.device_records import CellRecord
from reinforce.student.train import train
from reinforce.training.config import Compute
from reinforce.training.ranks import join_ranks
from teachers.decoding.sampling import sample_nucleus, sample_top_k
from teachers.runtime import accelerator
from teachers.runtime.accelerator import Accelerator
from tests.helpers.batches import CONFIG, LAYERS, make_inference, pixels, rows
from tests.helpers.data import config_of, members_of, tree, write_tar
from tests.helpers.decoding import decode_pool
from tests.helpers.evaluation import write_colour_folder
from tests.helpers.models import ColorTeacher, GroupCaptioner, SeedCaptioner
from tests.helpers.models.tiny_coca import batch, build
from tests.helpers.models.tiny_models import open_clip_model
from tests.helpers.reinforced import small_dataset
from tests.helpers.stand_in_cuda import StandIn, stand_in_cuda, stand_in_mps
from tests.helpers.students import student_folder
from tests.helpers.trainings import curve


@pytest.fixture
def cuda() -> Iterator[StandIn]:
    with stand_in_cuda() as cuda:
        yield cuda


NAMES = ("embeddings/red/images", "captions/namer")


class Noting(ColorTeacher):
    """Notes what the stream of the first batch has waited for, and what memory is kept for it."""

    awaited: list[Any]
    recorded: int

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.is_cuda:
            stream: Any = torch.cuda.current_stream()
            self.awaited, self.recorded = [*stream.awaited], len(stream.recorded)
        return super().encode_images(pixels)


def outputs(device: str) -> tuple[dict[str, Any], Noting]:
    there = torch.device(device)
    models = LoadedModels(
        {"teachers": {"red": Noting(there)}, "captioners": {"namer": SeedCaptioner(there)}}, Accelerator(device)
    )
    cells = pixels()
    for array in (cells.crops, *cells.whole.values()):
        models.accelerator.pin(array)
    run = make_inference(CONFIG, [LAYERS[name] for name in NAMES], models).run
    return run(rows(3), cells), models.loaded["teachers"]["red"]  # type: ignore[return-value]


def test_cells_can_be_written_again_where_only_captions_of_row_groups_see_images(cuda: StandIn) -> None:
    def captions(device: str) -> Any:
        models = LoadedModels({"captioners": {"namer": GroupCaptioner(torch.device(device))}}, Accelerator(device))
        cells = pixels()
        for array in cells.whole.values():
            models.accelerator.pin(array)
        outputs = make_inference(CONFIG, [LAYERS["captions/namer"]], models).run(rows(3), cells)
        for array in cells.whole.values():
            array[:] = 0  # as decode processes do for the next images
        encoded, drawn = zip(*outputs["captions/namer"], strict=True)
        return np.array(models.loaded["captioners"]["namer"].decode([*encoded], np.stack(drawn), 3))  # type: ignore[attr-defined]

    expected = captions("cpu")
    with cuda.delayed(), cuda.counted() as counts:
        np.testing.assert_allclose(captions("cuda"), expected, rtol=1e-5)
    streams = {copy.stream for copy in counts.copies_to_device()}
    assert torch.cuda.default_stream() not in streams
    [wait] = [place for place in counts.waits if "Event.synchronize" in place]
    assert counts.waits[wait] == 1, "for the copies alone, while models compute"


def test_memory_that_cannot_be_pinned_leaves_no_error_for_the_next_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = np.zeros(8, np.uint8)
    with stand_in_cuda() as cuda:
        accelerator, pending, operate = Accelerator("cuda"), list[RuntimeError](), cuda.operate

        def register(address: int, size: int, flags: int) -> int:
            pending.append(RuntimeError("CUDA error: out of memory"))
            return 2

        def kernel(*arguments: Any) -> Any:  # as C10_CUDA_KERNEL_LAUNCH_CHECK
            out = operate(*arguments)
            if pending:
                raise pending.pop()
            return out

        monkeypatch.setattr(torch.cuda.cudart(), "cudaHostRegister", register)
        monkeypatch.setattr(cuda, "operate", kernel)
        assert not accelerator.pin(memory)
        assert accelerator.put_parts([memory]).tolist() == [0] * 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("memory")
    write_tar(folder / "source" / "0.tar", members_of(0, 8))
    return config_of(
        f"{folder}/source/*.tar",
        folder / "out",
        captioners={},
        teachers={"vit": {"model": open_clip_model(folder / "vit"), "precision": "bf16"}},
        workers={"batch": 16, "max": 1, "gpus": 1},
    )


def load(config: dict[str, Any], **changes: Any) -> tuple[Config, Plan, LoadedModels]:
    parsed = parse_config({**config, **changes})
    plan = make_plan(parsed)
    return parsed, plan, load_models(parsed, plan.layers.values())


def test_a_shard_is_finished_with_less_memory_and_reports_it(
    config: dict[str, Any], tmp_path: Path, cuda: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    results = []
    parsed, plan, models = load(config, output=str(tmp_path / "whole"))
    models.costs = measure_costs(models, parsed, plan.layers.values())
    for output in ("whole", "halved"):
        store = Store(str(tmp_path / output))
        results.append(ShardProcess(plan.pending[0], parsed, plan.layers, store, models, decode_pool(), 8).run())
        cuda.memory = cuda.allocated + (cuda.peak - cuda.allocated) // 2
    whole, halved = results
    assert not [note for note in whole.notes if "at once" in note]
    assert any("from now on 4 images at once" in note for note in halved.notes), halved.notes
    assert (halved.samples, halved.refused) == (8, {})
    assert tree(tmp_path / "halved").keys() == tree(tmp_path / "whole").keys()
    assert halved.device["name"] == "NVIDIA H100 80GB HBM3"
    assert halved.device["memory_peak"] > 0
    images = halved.stages["embeddings/vit/images"]
    assert images["flops"] > 16 * 1e5
    assert images["peak_flops"] == pytest.approx(images["seconds"] * 989e12)


def test_auto_is_what_fits_and_without_memory_for_one_image_the_run_ends(
    config: dict[str, Any], cuda: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed, plan, models = load(config, workers={"batch": "auto", "gpus": 1})
    layers, models_only = [plan.layers["embeddings/vit/images"]], cuda.allocated
    with monkeypatch.context() as patch:
        patch.setattr(full_batch, "forget_peak", lambda _: None)
        assert find_batch(models, parsed, layers, largest=8).workers.images == 8
    cuda.memory = models_only + int(0.6 * (cuda.peak - models_only))
    assert find_batch(models, parsed, layers, largest=8).workers.images == 4
    assert cuda.peak == cuda.allocated, "the peak of the run does not include the search"
    cuda.memory = models_only + 1000
    with pytest.raises(UserError, match=r"does not fit in the memory of the device|do not fit"):
        find_batch(models, parsed, layers, largest=8)


def test_a_thread_that_drops_a_tensor_waits_for_none_that_computes(cuda: StandIn) -> None:
    """Threads of gloo drop tensors of a collective while they hold what the computing thread waits for."""
    tensors, before = [torch.ones(1000, device="cuda")], cuda.allocated
    with cuda._one_thread:
        thread = threading.Thread(target=tensors.clear)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
    assert cuda.allocated == before - 4000


NO_FLOAT64 = ": on the CPU, because mps has no float64"
FALLBACKS = ("augmentations of the backend device-1", "ranks of classes", "ranks of matches")


@pytest.fixture(autouse=True)
def fresh_log() -> None:
    accelerator.device_of_float64.cache_clear()


def fallen_back(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records]
    return [text.removesuffix(NO_FLOAT64) for text in found if text.endswith(NO_FLOAT64)]


def test_auto_is_mps_behind_cuda_and_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in_mps():
        assert Accelerator("auto", "auto").device.type == "mps"
        assert Accelerator("auto", "auto").precision == "fp32"
        with Accelerator("mps", "bf16").autocast():
            weight = torch.ones(2, 2, device="mps")
            assert (weight @ weight).dtype == torch.bfloat16
        monkeypatch.setattr(torch.amp, "is_autocast_available", lambda device: False)
        with pytest.raises(ValueError, match="'bf16' needs torch"):
            Accelerator("mps", "bf16")
        monkeypatch.undo()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert accelerator.best_device() == "cuda"
        monkeypatch.undo()
    with pytest.raises(ValueError, match="torch sees no GPU of Apple"):
        Accelerator("mps")


def test_only_a_rank_alone_is_on_mps(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def device(compute: Compute) -> str:
        with join_ranks(compute) as ranks:
            return str(ranks.accelerator.device.type)

    with stand_in_mps():
        assert [device(Compute(gpus=gpus)) for gpus in (None, 1, 0)] == ["mps", "mps", "cpu"]
        assert not caplog.records
        for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 0}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        assert device(Compute()) == "cpu"
    assert "several ranks train on the CPU" in caplog.text


@pytest.mark.usefixtures("no_pictures")
def test_a_training_on_mps_has_losses_and_metrics_of_a_cpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With augmentation on the device, an average of weights, two sets and a checkpoint."""
    dataset, compute = small_dataset(tmp_path, (16,)), {"accumulate": 2}
    config: dict[str, Any] = {
        "student": {"model": student_folder(tmp_path / "student")},
        "data": {"datasets": dataset, "workers": 0, "window": 12, "backend": "device-1"},
        "loss": {"lambda": 0.7},
        "evaluate": {
            "retrieval": {"own": {"pairs": dataset}},
            "zero_shot": {"colours": {"images": write_colour_folder(tmp_path / "colours")}},
        },
        "train": {"steps": 4, "batch": 8, "optimizer": {"warmup": 0}, "log_every": 1, "ema": 0.9, "compute": compute},
    }
    train({**config, "output": str(tmp_path / "on-cpu")})
    assert not fallen_back(caplog)
    with stand_in_mps() as mps, mps.counted() as counts:
        results = train({**config, "output": str(tmp_path / "on-mps")})
    assert counts.operations > 1000
    assert curve(tmp_path / "on-mps") == pytest.approx(curve(tmp_path / "on-cpu"), rel=1e-4)
    assert results.metrics.keys() >= {"zero_shot/colours/top1", "retrieval/own/text_to_image/r1"}
    assert list((tmp_path / "on-mps").glob("checkpoints/*.safetensors"))
    assert fallen_back(caplog) == [*FALLBACKS]


def test_captions_on_mps_are_those_of_a_cpu(tmp_path: Path) -> None:
    """Numbers and sums have 24 bits there, which decides no word here."""
    expected = build("cpu").caption(*batch(build("cpu"), 4))
    with stand_in_mps() as mps, mps.counted() as counts:
        captioner = build("mps")
        pixels, seeds = batch(captioner, 4)
        assert captioner.caption(pixels.to("mps"), seeds) == expected
    assert counts.operations > 100


@pytest.mark.parametrize("vocabulary", [8, 9000])
@pytest.mark.parametrize("choose", [lambda *of: sample_nucleus(*of, 1.0, 0.9), lambda *of: sample_top_k(*of, 1.0, 5)])
def test_tokens_follow_their_probabilities_also_in_float32(choose: Any, vocabulary: int) -> None:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(0)).repeat(2000, 1)
    u = torch.from_numpy((np.arange(2000) + 0.5) / 2000)
    u[0], u[-1] = 2.0**-53, 1.0
    expected = choose(logits, u)
    with stand_in_mps():
        found = choose(logits.to("mps"), u.float().to("mps")).cpu()
    assert (found != expected).float().mean() < 0.01, "at edges between two tokens alone"


def test_images_are_augmented_on_the_cpu_for_mps(caplog: pytest.LogCaptureFixture) -> None:
    cells = torch.randint(0, 256, (2, 24, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    records = [CellRecord(24, 20, (("Contrast", (1.4,)), ("AutoContrast", ()))), CellRecord(20, 24, ())]
    expected = augment(cells, records, 16)
    with stand_in_mps():
        found = augment(cells.to("mps"), records, 16)
        assert found.device.type == "mps"
        assert torch.equal(found.cpu(), expected)
    assert fallen_back(caplog) == [FALLBACKS[0]]


def test_probes_of_features_are_computed_on_the_cpu_for_mps(caplog: pytest.LogCaptureFixture) -> None:
    features = torch.nn.functional.normalize(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    labels = np.arange(30) % 3
    data = PartFeatures(features, labels, features, labels)
    config = probes.ProbeSet.model_construct(l2=[0.01], k=[3])
    expected = probes._classify(config, data, Accelerator("cpu"))
    with stand_in_mps():
        assert probes._classify(config, data, Accelerator("mps")) == expected
    assert fallen_back(caplog) == ["nearest neighbours", "linear probes"]
