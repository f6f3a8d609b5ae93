"""Whether the device computes what a CPU computes, with every switch of a run, by models that tell inputs apart.

What is right is what open_clip's own forward pass computes. The demo's models are trained, so that their embeddings of
different inputs differ; those of the recipe have random weights unless real ones are given. The error of a result is
its largest distance from that of open_clip on the CPU in fp32, as a share of the spread between inputs. In bf16, as
runs compute, it may be twice that of open_clip in bf16; in fp32, where the same code has hardly any rounding, at most
``EXACT_ERROR``. One block of the demo's models with weights that are off by 1 % exceeds both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image, ImageDraw

from benchmarks.gpu import recipe
from benchmarks.gpu.bench import Bench
from benchmarks.pipeline.figures import Figure
from teachers import registry
from teachers.open_clip.teacher import image_spec, load_model, model_name
from teachers.pixels import to_pixels
from teachers.spec import CaptionerSpec, TeacherSpec

RIGHT = "right"
RUNS, GRAPHS, PLAIN, EXACT = "as in runs", "graphs", "plain", "in fp32"
#: Keys of a teacher and of a captioner that choose how the same weights are computed.
TEACHERS: dict[str, dict[str, Any]] = {
    RUNS: {},
    "compiled": {"compile": True},
    "not compiled": {"compile": False},
    PLAIN: dict.fromkeys(TeacherSpec.fast_paths, False),
    EXACT: {"precision": "fp32"},
}
CAPTIONERS: dict[str, dict[str, Any]] = {
    RUNS: {},
    "compiled": {"compile": True},
    GRAPHS: {"compile": False, "graphs": True},
    PLAIN: dict.fromkeys(CaptionerSpec.fast_paths, False),
    EXACT: {"precision": "fp32"},
}
EXACT_ERROR = 0.001
_ROUNDING = 2.0  # error in bf16, as a multiple of that of a CPU in bf16
_TEXT = "a photo of a dog that runs on the beach in the sun with a red ball and children watch it"
_TOKENS = (1000, 3000)  # words of the vocabularies of all captioners


def measure_right(bench: Bench) -> list[Figure]:
    """Embeddings and logits of captions compared with those of the CPU, and captions of graphs with those without."""
    figures: list[Figure] = []
    for name, spec in {**recipe.demo().teachers, **recipe.teachers(bench)}.items():
        figures += bench.attempt(f"right: {name}", partial(_compare_embeddings, bench, name, spec))
    for name, captioner in (*recipe.demo().captioners.items(), recipe.captioner(bench)):
        figures += bench.attempt(f"right: {name}, logits", partial(_compare_logits, bench, name, captioner))
        figures += bench.attempt(f"right: {name}, captions", partial(_compare_captions, bench, name, captioner))
    return figures


def captioners(bench: Bench, spec: CaptionerSpec) -> Iterator[tuple[str, CaptionerSpec]]:
    """A captioner with each of its switches. A CPU has no graphs, and takes minutes to compile."""
    switches = {name: keys for name, keys in CAPTIONERS.items() if bench.on_cuda or name in (RUNS, PLAIN, EXACT)}
    return recipe.available(spec, switches)


def pixels_of(image: Any, count: int) -> torch.Tensor:
    """[count, 3, H, W] on the CPU, each of other shapes in other colors, with a little noise."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 3, 6, 6, generator=random)
    size = (image.height, image.width)
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic", align_corners=False)
    return smooth + 0.1 * torch.randn(count, 3, *size, generator=random)


def drawings_of(image: Any, count: int) -> torch.Tensor:
    """[count, 3, H, W] on the CPU, normalized: colored shapes on white, which trained models tell apart."""
    random, drawn = np.random.default_rng(0), []
    for _ in range(count):
        picture = Image.new("RGB", (image.width, image.height), "white")
        for shape in (ImageDraw.Draw(picture).ellipse, ImageDraw.Draw(picture).rectangle):
            x, y, width, height = (int(share * image.width) for share in random.uniform(0.2, 0.6, 4))
            shape((x, y, x + width, y + height), fill=tuple(random.integers(0, 256, 3).tolist()))
        drawn.append(torch.from_numpy(np.array(picture)))
    return to_pixels(torch.stack(drawn), image)


def texts_of(count: int) -> list[str]:
    """Texts of 3 to 20 words, each another one."""
    words = _TEXT.split()
    return [" ".join((words[n % 7 :] + words)[: 3 + n % 18]) + f" {n}" for n in range(count)]


def _compare_embeddings(bench: Bench, name: str, spec: TeacherSpec) -> list[Figure]:
    count = bench.size.compared
    plain = [_reference_embeddings(spec, count, reduced) for reduced in (False, True)]
    compare = {side: _Comparison(*(embeddings[side] for embeddings in plain)) for side in plain[0]}
    figures = []
    for side, embeddings in plain[0].items():
        others = float((embeddings @ embeddings.T).fill_diagonal_(0).sum()) / (count * (count - 1))
        figures.append(Figure(RIGHT, f"{name}, {side}: mean cosine of different inputs", others, "cosine"))
    switches = {name: keys for name, keys in TEACHERS.items() if bench.on_cuda or name != "not compiled"}
    for switch, variant in recipe.available(spec, switches):  # runs on a CPU do not compile
        teacher: Any = registry.load_model(name, variant, bench.device)
        images = teacher.encode_images(drawings_of(teacher.image, count).to(bench.device))
        for side, found in {"images": images, "texts": teacher.encode_texts(texts_of(count))}.items():
            figures.append(compare[side].figure(f"{name}, {switch}, {side}", found.float().cpu(), switch == EXACT))
    return figures


@torch.inference_mode()
def _reference_embeddings(spec: TeacherSpec, count: int, reduced: bool) -> dict[str, torch.Tensor]:
    """By open_clip's own forward pass on the CPU, in fp32 or in bf16."""
    model: Any = load_model(spec).eval()
    pixels = drawings_of(image_spec(open_clip.get_model_preprocess_cfg(model)), count)
    tokens = open_clip.get_tokenizer(model_name(spec))(texts_of(count))
    with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
        found = {"images": model.encode_image(pixels), "texts": model.encode_text(tokens)}
    return {side: torch.nn.functional.normalize(features.float(), dim=-1) for side, features in found.items()}


class _Comparison:
    """Results of open_clip on the CPU in fp32 and in bf16, [inputs, ..., n], with which others are compared."""

    def __init__(self, expected: torch.Tensor, rounded: torch.Tensor) -> None:
        self._expected, self._rounded = expected.double(), rounded

    def figure(self, what: str, found: torch.Tensor, exact: bool) -> Figure:
        limit = EXACT_ERROR if exact else _ROUNDING * self._error(self._rounded)
        name = f"{what}: error, as a share of the spread"
        return Figure(RIGHT, name, self._error(found), "", limit, "at most")

    def _error(self, found: torch.Tensor) -> float:
        """The largest distance of a row, divided by the root mean square of the distances of rows from their mean."""
        spread = (self._expected - self._expected.mean(0)).norm(dim=-1).square().mean().sqrt()
        return float((found.double() - self._expected).norm(dim=-1).max() / spread)


def _compare_logits(bench: Bench, name: str, spec: CaptionerSpec) -> list[Figure]:
    """Logits of fixed texts, by open_clip's own forward pass on the CPU and by the captioner's steps."""
    tokens = torch.randint(
        *_TOKENS, (bench.size.compared, bench.size.words), generator=torch.Generator().manual_seed(1)
    )
    tokens[:, 0] = open_clip.get_tokenizer(model_name(spec))("")[0, 0]
    compare = _Comparison(*(_reference_logits(spec, tokens, reduced) for reduced in (False, True)))
    figures = []
    for switch, variant in captioners(bench, spec):
        captioner = registry.load_model(name, variant, bench.device)
        pixels = drawings_of(captioner.image, len(tokens)).to(bench.device)
        found = _logits(captioner, pixels, tokens.to(bench.device))
        figures.append(compare.figure(f"{name}, {switch}, logits", found, switch == EXACT))
    return figures


@torch.inference_mode()
def _reference_logits(spec: CaptionerSpec, tokens: torch.Tensor, reduced: bool) -> torch.Tensor:
    model: Any = load_model(spec).eval()
    pixels = drawings_of(image_spec(open_clip.get_model_preprocess_cfg(model)), len(tokens))
    with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
        latent, images = model._encode_image(pixels)
        output = model(None, tokens, image_latent=latent, image_embs=images, output_labels=False)
    logits: torch.Tensor = output["logits"].float()
    return logits


@torch.inference_mode()
def _logits(captioner: Any, pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    decoder = captioner._decoder
    decoder.begin(captioner.encode(pixels), 1)
    steps = [decoder.next_logits(tokens[:, : n + 1]).float().cpu() for n in range(tokens.shape[1])]
    return torch.stack(steps, dim=1)


def _compare_captions(bench: Bench, name: str, spec: CaptionerSpec) -> list[Figure]:
    """Captions of one call that differ from those of another: in two calls, and with graphs and eager.

    Steps that are compiled round in other places, so only their logits are compared.
    """
    seeds = np.arange(bench.size.compared * spec.captions, dtype=np.uint64).reshape(-1, spec.captions)
    found: dict[str, Sequence[Any]] = {}
    figures = []
    for switch, variant in captioners(bench, spec):
        if variant.compile is True or switch == EXACT:
            continue
        captioner = registry.load_model(name, variant, bench.device)
        pixels = drawings_of(captioner.image, bench.size.compared).to(bench.device)
        found[switch], again = (captioner.caption(pixels.clone(), seeds) for _ in range(2))
        what = f"{name}, {switch}: images whose captions differ in two calls"
        figures.append(Figure(RIGHT, what, _different(found[switch], again), "", 0.0, "at most"))
    different = _different(found.get(GRAPHS, found[RUNS]), found[PLAIN])
    what = f"{name}: images whose captions differ with graphs and plain"
    return [*figures, Figure(RIGHT, what, different, "", 0.0, "at most")]


def _different(one: Sequence[Any], other: Sequence[Any]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))
