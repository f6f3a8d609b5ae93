"""Training, evaluation, augmentation and captions on a stand-in for a GPU of Apple, which has no float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reinforce.dataset.augment.device import augment
from reinforce.dataset.augment.device_records import CellRecord
from reinforce.evaluation.kinds import knn, linear
from reinforce.evaluation.kinds.parts import Features
from reinforce.student.train import train
from reinforce.training.config import Compute
from reinforce.training.distributed.ranks import join_ranks
from teachers.decoding.sampling import sample_nucleus, sample_top_k
from teachers.runtime import accelerator
from teachers.runtime.accelerator import Accelerator
from tests.helpers.evaluation import write_colour_folder
from tests.helpers.models.tiny_coca import batch, build
from tests.helpers.reinforced import small_dataset
from tests.helpers.stand_in_cuda import stand_in_mps
from tests.helpers.students import student_folder
from tests.helpers.trainings import curve

NO_FLOAT64 = ": on the CPU, because mps has no float64"
FALLBACKS = ("augmentations of the backend device-1", "ranks of classes", "ranks of matches")


@pytest.fixture(autouse=True)
def fresh_log() -> None:
    accelerator._log_once.cache_clear()


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
    data = Features(features, labels, features, labels)
    sets = ((linear, linear.LinearSet), (knn, knn.KnnSet))
    configs = [(kind, of.model_construct(l2=[0.01], k=[3], temperature=0.1)) for kind, of in sets]
    expected = [kind._classify(config, data, Accelerator("cpu")) for kind, config in configs]
    with stand_in_mps():
        assert [kind._classify(config, data, Accelerator("mps")) for kind, config in configs] == expected
    assert fallen_back(caplog) == ["linear probes", "nearest neighbours"]
