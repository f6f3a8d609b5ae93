"""Models of real size, without their memory: shapes, data types, operations, FLOPs, and the memory of their steps."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from reinforce import settings
from reinforce.student.config import StudentConfig
from reinforce.student.model import StudentModel
from reinforce.student.terms import pairs as chunks
from reinforce.student.terms.pairs import Objective, contrastive_losses
from reinforce.training.step import backpropagate
from reinforce.training.task import Batch, Encoded
from teachers.coca.decoder import CocaNetwork
from teachers.coca.fixed_decoder import FixedCocaDecoder
from teachers.decoding.device_sampling import DeviceSampler
from teachers.decoding.sampling import DecodingRules, TokenChooser
from teachers.runtime.accelerator import _PART, GIB, Accelerator
from teachers.runtime.flops import counted_flops
from tests.helpers.pages import ROOT
from tests.helpers.real_sizes import Operations, PeakMemory, build_without_memory, fake_student
from tests.helpers.specs import captioner_spec
from tests.helpers.students import batch_for, built, student_folder

# GFLOPs of an image and of a text, in docs/model_profile.csv of open_clip.
PROFILES = {"ViT-L-14-quickgelu": (224, 768, 162.03, 13.30), "ViT-SO400M-14-SigLIP": (224, 1152, 220.35, 13.19)}
IMAGES, CAPTIONS, LENGTH = 128, 5, 75
TEACHERS, KINDS = ("dfn2b", "dfn2b-s39b"), ("image", "caption", "synthetic")
SAMPLES = 256  # so many that gradients, which are counted among the activations, are few beside them


@pytest.mark.parametrize("name", PROFILES)
def test_towers_compute_in_bf16_and_have_the_flops_that_open_clip_publishes(name: str) -> None:
    size, dim, of_image, of_text = PROFILES[name]
    mode, accelerator = FakeTensorMode(), Accelerator("cpu", "bf16")
    model = build_without_memory(mode, name).requires_grad_(False)
    with mode:
        pixels = torch.empty(256, 3, size, size)
        tokens = torch.empty(256, model.context_length, dtype=torch.int64)
    for inputs, encode, gflops in ((pixels, model.encode_image, of_image), (tokens, model.encode_text, of_text)):
        features: list[torch.Tensor] = []
        with mode, accelerator.forward():
            flops = counted_flops(lambda: features.append(encode(inputs)))  # noqa: B023
        assert (features[0].shape, features[0].dtype) == ((256, dim), torch.bfloat16)
        assert flops / 256 / 1e9 == pytest.approx(gflops, abs=0.01)


def test_128_images_with_5_captions_are_one_part_on_40_gib_and_a_step_waits_for_nothing() -> None:
    mode, accelerator = FakeTensorMode(), Accelerator("cpu", "bf16")
    model = build_without_memory(mode, "coca_ViT-L-14").requires_grad_(False)
    spec = captioner_spec(model="coca_ViT-L-14", captions=CAPTIONS, repetition_penalty=1.2)
    with mode, torch.inference_mode():
        with accelerator.forward():
            _, images = model.visual(torch.empty(IMAGES, 3, 224, 224))
        assert (images.shape, images.dtype) == ((IMAGES, 255, 768), torch.bfloat16)
        network = CocaNetwork(model, accelerator, LENGTH, packed=False)
        decoder = FixedCocaDecoder(network, accelerator, graphs=False)
        rules = DecodingRules(49406, 49407, torch.zeros(49408, dtype=torch.bool), 5, LENGTH, spec.repetition_penalty)
        sampler = DeviceSampler.__new__(DeviceSampler)
        sampler._rules, sampler._choose, sampler._state = rules, TokenChooser(spec), None
        sampler._mask, sampler._padding, sampler.advance = rules.mask(), 0, sampler._advance
        state = sampler.reserve(640)
        with decoder.opened(images.repeat(2, 1, 1).unbind(), CAPTIONS, IMAGES):
            assert decoder.room(2 * IMAGES, CAPTIONS) == (640, 160)
            with Operations() as operations:  # fake tensors raise where a value is needed
                sampler._step(decoder, state, 640)
                logits = decoder.step(state.tokens, state.position)
            assert logits.shape == (640, 49408)
    assert operations.raising <= {"cumsum"}, "the CPU's; see ``teachers.decoding.sampling._sums``"
    # Keys and values in bf16: of texts in 24 layers; of 255 image tokens in 12, of a quarter more images than fill the
    # rows; in fp32, five arrays of logits.
    texts = 640 * 24 * 2 * LENGTH * 768 * 2
    of_images = 160 * 12 * 255 * 2 * 768 * 2
    assert (decoder.cache.nbytes, decoder.image_cache.nbytes) == (texts, of_images)
    needed = texts + of_images + 5 * 640 * 49408 * 4
    assert decoder.bytes_per_image(CAPTIONS, 255) * IMAGES == needed
    assert needed < 40 * GIB // _PART
    assert needed > 24 * GIB // _PART, "a card of 24 GiB cuts it into parts"


class _Students:
    """A student's task, without a dataset."""

    def __init__(self, model: StudentModel) -> None:
        self.model = model
        self._objective = Objective(0.7, "softmax", dict.fromkeys(TEACHERS, 60.0))

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def losses(self, encoded: Encoded, batch: Batch) -> dict[str, torch.Tensor]:
        return contrastive_losses(
            self._objective, encoded.features, encoded.scalars["logit_scale"], None, batch["targets"]
        )


@functools.cache
def step(name: str, checkpointing: bool, microbatches: int = 1, kept: int = 0) -> tuple[StudentModel, PeakMemory]:
    """A student in bf16 after a step of ``SAMPLES`` with two texts, and what the step did."""
    mode = FakeTensorMode()
    student = fake_student(mode, name, checkpointing)
    size = student.image.height
    with mode:
        batch = {
            "image": torch.empty(SAMPLES, size, size, 3, dtype=torch.uint8),
            "caption": torch.empty(SAMPLES, 77, dtype=torch.int64),
            "synthetic": torch.empty(SAMPLES, 77, dtype=torch.int64),
            "targets": {name: {kind: torch.empty(SAMPLES, 768) for kind in KINDS} for name in TEACHERS},
        }
    with mode, PeakMemory() as observed:
        seeds = [0] * microbatches
        backpropagate(_Students(student), student, batch, SAMPLES, seeds, Accelerator("cpu", "bf16"), kept)
    return student, observed


def test_a_step_of_a_student_has_deterministic_operations_on_cuda_and_gradients_in_fp32() -> None:
    student, observed = step("MobileCLIP2-S0", False)
    gradients = [parameter.grad for parameter in student.parameters()]
    assert all(gradient is not None and gradient.dtype is torch.float32 for gradient in gradients)
    assert {"convolution_backward", "native_batch_norm_backward", "embedding_dense_backward"} <= observed.names
    assert not observed.raising
    assert observed.bytes / SAMPLES / 1e9 == pytest.approx(0.123, abs=0.003), "GB for each image, in docs/students.md"


def test_of_two_microbatches_the_first_is_kept_in_little_more_memory_than_one_takes() -> None:
    """What is more are the activations of a layer of the second one, while its features are computed."""
    whole, twice, once = (step("MobileCLIP2-S0", False, *how)[1].bytes / SAMPLES for how in ((), (2, 0), (2, 1)))
    assert twice / whole == pytest.approx(0.51, abs=0.02)
    assert (once - twice) / 1e6 == pytest.approx(2.9, abs=0.3), "MB for each image of the batch, in docs/students.md"


@pytest.fixture(params=[1, 8])
def ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    """The ranks, of which this process is the last."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=request.param - 1, world_size=request.param)
    yield request.param
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("share", [0.7, 1.0])
def test_the_loss_of_4096_pairs_and_of_65536_over_8_ranks_is_in_fp32_and_takes_what_the_page_states(
    share: float, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    pairs, gigabytes = (4096, 0.65) if ranks == 1 else (65536, 2.9 - 2 * (share - 0.7))
    scale = ranks  # features, gathered ones and chunks of as many rows are smaller by it, and so is all memory
    monkeypatch.setattr(chunks, "CHUNK", chunks.CHUNK // scale)
    rows = pairs // ranks // scale
    with FakeTensorMode(), PeakMemory() as observed:
        features = {kind: torch.empty(rows, 512, dtype=torch.bfloat16, requires_grad=True) for kind in KINDS}
        targets = {name: {kind: torch.empty(rows, 768) for kind in KINDS} for name in TEACHERS}
        objective = Objective(share, "softmax", dict.fromkeys(TEACHERS, 60.0))
        losses = contrastive_losses(objective, features, torch.empty((), requires_grad=True), None, targets)
        torch.stack([*losses.values()]).sum().backward()
    assert observed.bytes * scale / 1e9 == pytest.approx(gigabytes, abs=0.1)
    assert len(losses) == (4 if share < 1 else 2)
    assert all(loss.dtype is torch.float32 for loss in losses.values())
    assert not observed.raising
    assert all(value.grad is not None and value.grad.dtype is torch.bfloat16 for value in features.values())


STUDENTS = [ROOT / "configs/mobileclip2-s0.yaml", *sorted(ROOT.glob("configs/recipes/*-*-datacompdr*.yaml"))]
STUDENTS += sorted(ROOT.glob("configs/recipes/mobileclip-*-dfndr*.yaml"))
LOSS = 2.5e9  # of 65,536 pairs, most of it vectors of all ranks; see test_real_sizes.py


def gigabytes(config: StudentConfig, parts: int) -> float:
    """GB of a rank in a step; in several parts, the loss is computed before the activations that are kept."""
    compute, rows = config.train.compute, config.train.batch // config.train.compute.ranks
    student, observed = step(config.student.model, compute.gradient_checkpointing)
    state = 4 * sum(parameter.nbytes for parameter in student.parameters())  # weights, gradients and two moments
    loss = LOSS * config.train.batch / 65536
    activations = observed.bytes / SAMPLES * rows / parts
    return (state + (activations + loss if parts == 1 else max(activations, loss))) / 1e9


@pytest.mark.parametrize("path", STUDENTS, ids=lambda path: path.stem)
def test_a_step_of_a_shipped_config_fits_on_a_card_of_80_gb_and_takes_what_its_comment_states(path: Path) -> None:
    config = settings.load(StudentConfig, path)
    parts = config.train.compute.accumulate
    needed = gigabytes(config, 1 if parts == "auto" else parts)
    assert re.findall(r"about (\d+) GB in a step", path.read_text()) == [f"{needed:.0f}"]
    assert needed < 0.94 * 80, "a trial keeps 6 % free"
    assert parts == "auto" or gigabytes(config, 1) > 120, "in one part"


def test_memory_by_arithmetic_is_less_than_a_process_takes_by_what_its_operations_need(tmp_path: Path) -> None:
    """Convolutions on a CPU reorder their inputs, which takes a third of a small FastViT's memory."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux, which resets the peak of a process")
    student = built(student_folder(tmp_path, "mobileclip")).train()
    batch = batch_for(student, 256)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _of_process("VmRSS")
    with PeakMemory() as peak:
        encoded = student(batch)
        torch.stack([feature.sum() for feature in encoded.features.values()]).sum().backward()
    assert 1 < (_of_process("VmHWM") - before) / peak.bytes < 1.6


def _of_process(key: str) -> int:
    """Bytes that Linux states for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
