"""``make bench-captions``: speed of CoCa's decoding, five captions per image, compared with open_clip's.

Both implementations have the same random weights, sample the same tokens (nucleus sampling, top_p 0.9) from the same
uniform numbers, and alternate in one process with the same threads. If a single token differs, no speed is reported.
There are two cases: captions of the full 30 tokens, including start and end; and captions of natural length, drawn from
5 + Poisson(7) (mean 12), since random weights never end a caption.

open_clip's implementation is the loop of its ``CoCa.generate``, copied with its own forward pass and the logits
processors of transformers. One thing differs: sampling inverts the cumulative distribution at a given number instead of
calling ``torch.multinomial``, so that tokens can be compared. As in RayGen, the loop runs once for each caption of an
image: it encodes the images each time, runs the decoder over all tokens so far at each step, computes logits of all
positions, continues finished rows until all are finished, and ends with a forward pass whose output is not used.
``generate`` itself is timed as well where it runs: it needs a class that transformers 5 no longer has. With 4.55.4 it
gave the same greedy tokens as both implementations here, in the CPU time of the loop (28.1 and 29.6 s, the loop 28.3
and 29.4 s, for five full-length captions of one image, coca_ViT-B-32, one thread).

The bound is the time for one encoding of the images and the cached steps, if their floating point operations ran at the
speed that this machine reaches in matrix products of these shapes.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.stored import write_results
from teachers.coca.decoder import CocaDecoder, CocaNetwork
from teachers.decoding.decode import sample
from teachers.decoding.sampling import DecodingRules, sample_nucleus, uniforms
from teachers.fast_paths.frozen import FrozenLinear, freeze
from teachers.runtime.accelerator import Accelerator

CAPTIONS, TOKENS, TOP_P = 5, 30, 0.9
WORDS = TOKENS - 2
START, END, PAD = 49406, 49407, 0
TARGETS = {"fixed": 8.0, "natural": 12.0}
RESULTS = Path(__file__).parent / "results" / "captions.json"
#: A marker among the uniform numbers, all below 1, that ends a caption.
STOP = 2.0


@dataclass(frozen=True)
class Case:
    """A model, the number of images in a batch, and the number of rounds."""

    model: str
    images: int
    rounds: int


CASES = (Case("coca_ViT-B-32", images=4, rounds=3), Case("coca_ViT-L-14", images=8, rounds=2))


class Bench:
    """A model and both implementations of its decoding. Texts are [images][captions] lists of token ids."""

    def __init__(self, case: Case) -> None:
        self.model = random_model(case.model)
        self.accelerator = Accelerator("cpu")
        self.visual = copy.deepcopy(self.model.visual)
        freeze(self.visual, self.accelerator)
        self.forward = CocaDecoder(CocaNetwork(self.model, self.accelerator, WORDS), self.accelerator)
        impossible = torch.zeros(self.model.text.vocab_size, dtype=torch.bool)
        impossible[[START, PAD]] = True  # `generate` ends a caption at the padding, which is the token "!"
        self.rules = DecodingRules(START, END, impossible, min_tokens=WORDS, max_tokens=WORDS)
        size = self.model.visual.image_size
        self.pixels = torch.randn(case.images, 3, *(size if isinstance(size, tuple) else (size, size)))
        drawn = uniforms(np.arange(case.images * CAPTIONS, dtype=np.uint64), WORDS)
        self.drawn = torch.from_numpy(drawn).unflatten(0, (-1, CAPTIONS))
        lengths = 5 + np.random.default_rng(0).poisson(7, (case.images, CAPTIONS))
        self.lengths = {"fixed": np.full_like(lengths, WORDS), "natural": lengths.clip(max=WORDS)}

    def decode(self, lengths: np.ndarray, choose: Callable[..., torch.Tensor] | None = None) -> list[list[list[int]]]:
        choose = choose or partial(sample_nucleus, temperature=1.0, top_p=TOP_P)

        def choose_or_stop(logits: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
            return torch.where(drawn == STOP, END, choose(logits, drawn.clamp(max=1)))

        stops = torch.arange(WORDS) >= torch.from_numpy(lengths)[..., None]
        with torch.inference_mode():
            self.forward.begin(self.encode(), CAPTIONS)
            texts = sample(self.forward, self.rules, choose_or_stop, self.drawn.masked_fill(stops, STOP))
        return [text for text in texts if text is not None]

    def encode(self) -> torch.Tensor:
        tokens: torch.Tensor = self.visual(self.pixels)[1]
        return tokens

    def decode_open_clip(self, lengths: np.ndarray) -> list[list[list[int]]]:
        by_caption = [self._generate(self.drawn[:, n], lengths[:, n]) for n in range(CAPTIONS)]
        return [list(texts) for texts in zip(*by_caption, strict=True)]

    def _generate(self, drawn: torch.Tensor, lengths: np.ndarray) -> list[list[int]]:
        """Run the loop of open_clip's ``CoCa.generate`` with ``generation_type="top_p"`` and ``seq_len=TOKENS``."""
        model = self.model
        processors = transformers.LogitsProcessorList(
            [
                transformers.MinLengthLogitsProcessor(TOKENS, END, device="cpu"),
                transformers.RepetitionPenaltyLogitsProcessor(1.0),
            ]
        )
        warper = transformers.TopPLogitsWarper(TOP_P)
        with torch.no_grad():
            latent, tokens = model._encode_image(self.pixels)
            out = torch.full((len(self.pixels), 1), START)
            while out.shape[1] < TOKENS:
                logits = model(self.pixels, out, image_latent=latent, image_embs=tokens, output_labels=False)
                logits = logits["logits"][:, -1]
                words = out.shape[1] - 1
                mask = (out[:, -1] == END) | (out[:, -1] == PAD)
                if mask.all():
                    break
                sampled = torch.full((len(out), 1), PAD)
                rows = logits[~mask].masked_fill_(self.rules.impossible, -torch.inf)
                rows = warper(out[~mask], processors(out[~mask], rows))
                probabilities = torch.softmax(rows, dim=-1)
                if words + 2 == TOKENS:
                    sampled[~mask] = END
                else:
                    sums = probabilities.cumsum(-1, dtype=torch.float64)
                    word = torch.searchsorted(sums, drawn[~mask, words, None] * sums[:, -1:])
                    ends = torch.from_numpy(lengths <= words)[~mask, None]
                    sampled[~mask] = torch.where(ends, END, word)
                out = torch.cat([out, sampled], dim=-1)
        return [row[1 : row.index(END)] for row in out.tolist()]

    def check(self) -> float:
        """Compare greedy captions with open_clip's forward pass; return the largest difference of a logit.

        Raises SystemExit if a token is not open_clip's most likely one, or a logit differs by more than 1e-4.
        """
        kept: list[torch.Tensor] = []

        def likeliest(logits: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
            kept.append(logits[::CAPTIONS])
            return logits.argmax(dim=-1)

        texts = [image[0] for image in self.decode(self.lengths["fixed"], likeliest)]
        ours = torch.stack(kept, dim=1)
        with torch.inference_mode():
            tokens = torch.tensor([[START, *words[:-1]] for words in texts])
            theirs = self.model(self.pixels, tokens, output_labels=False)["logits"]
            barred = self.rules.impossible | (torch.arange(theirs.shape[-1]) == END)
            words = theirs.masked_fill(barred, -torch.inf).argmax(-1).tolist()
            worst = (ours - theirs)[..., ~barred].abs().max().item()
        if words != texts or worst > 1e-4:
            raise SystemExit(
                f"greedy tokens or logits differ from open_clip's (logits by up to {worst:.1e}): no speedup"
            )
        return worst

    def measure(self, rounds: int) -> dict[str, dict[str, Any]]:
        """Measure both implementations alternately in each case."""
        results = {}
        for case, lengths in self.lengths.items():
            sides = {"ours": self.decode, "open_clip": self.decode_open_clip}
            clocks = {"wall": time.perf_counter, "cpu": time.process_time}
            seconds: dict[str, dict[str, list[float]]] = {side: {clock: [] for clock in clocks} for side in sides}
            self.decode(lengths)  # warm-up
            for _ in range(rounds):
                texts = {}
                for side, decode in sides.items():
                    starts = {name: clock() for name, clock in clocks.items()}
                    texts[side] = decode(lengths)
                    for name, clock in clocks.items():
                        seconds[side][name].append(clock() - starts[name])
                if texts["ours"] != texts["open_clip"]:
                    raise SystemExit(f"{case}: the tokens differ from those of open_clip's loop: no speedup")
            of = {side: {c: statistics.median(values) for c, values in of.items()} for side, of in seconds.items()}
            ratio = {clock: of["open_clip"][clock] / of["ours"][clock] for clock in clocks}
            results[case] = {"speedup": ratio, "median seconds": of, "seconds": seconds}
        return results

    def generate(self) -> float | None:
        """Return the seconds of ``CoCa.generate`` itself for captions of full length; None if it cannot run."""
        options = {"generation_type": "top_p", "top_p": TOP_P, "seq_len": TOKENS, "min_seq_len": TOKENS - 1}
        start = time.perf_counter()
        try:
            for _ in range(CAPTIONS):
                self.model.generate(self.pixels, **options)
        except AssertionError:  # "Please install transformers": a class that it imports no longer exists
            return None
        return time.perf_counter() - start

    def profile(self, lengths: np.ndarray) -> dict[str, float]:
        """Return the seconds of each part of one decoding with the cached decoder."""
        timer, network = PartTimer(), self.forward.network
        blocks = [*network.text_blocks, *network.decoder_blocks, *network.cross_blocks]
        watched = [
            *((block, "blocks") for block in blocks),
            *((block.mlp, "mlp") for block in blocks),
            *((block.project_image, "image keys and values") for block in network.cross_blocks),
            (network.vocabulary, "vocabulary"),
            (self.visual, "image encoder"),
        ]
        hooks = [hook for module, part in watched for hook in timer.watch(module, part)]

        def choose(logits: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
            with timer.measuring("sampling"):
                return sample_nucleus(logits, drawn, 1.0, TOP_P)

        with timer.measuring("all"):
            self.decode(lengths, choose)
        for hook in hooks:
            hook.remove()
        seconds = timer.seconds
        seconds["attention and its projections"] = seconds.pop("blocks") - seconds["mlp"]
        seconds["rest"] = 2 * seconds["all"] - sum(seconds.values())
        return dict(seconds)

    def bound(self, lengths: np.ndarray) -> dict[str, float]:
        """Return the operations of one decoding, and the seconds that they take at the speed of matrix products."""
        visual, width = self.visual, self.forward.network.width
        encoding, total = operations(self.encode), operations(lambda: self.decode(lengths))
        rows = round(int(lengths.sum()) / int(lengths.max()))
        patches = len(self.pixels) * (visual.grid_size[0] * visual.grid_size[1] + 1)
        speed = {"encoding": product_speed(patches, visual.conv1.out_channels), "step": product_speed(rows, width)}
        seconds = encoding / speed["encoding"] + (total - encoding) / speed["step"]
        return {
            "operations of encoding": encoding,
            "operations of steps": total - encoding,
            "operations a second in encoding": speed["encoding"],
            f"operations a second of {rows} rows": speed["step"],
            "seconds": seconds,
        }


class PartTimer:
    """Measures the seconds of each part."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def measuring(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    def watch(self, module: torch.nn.Module, part: str) -> list[Any]:
        """Measure the forward passes of a module; return the hooks, for removal."""
        starts: list[float] = []

        def before(*_: Any) -> None:
            starts.append(time.perf_counter())

        def after(*_: Any) -> None:
            self.seconds[part] += time.perf_counter() - starts.pop()

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def random_model(name: str) -> Any:
    """Return a CoCa with seeded random weights whose next-token distribution is as peaked as a trained model's."""
    config = open_clip.get_model_config(name)
    torch.manual_seed(0)
    model = open_clip.CoCa(**{key: value for key, value in config.items() if key != "custom_text"})
    projection = model.text_decoder.text_projection  # open_clip leaves it uninitialized
    torch.nn.init.normal_(projection, std=5 * projection.shape[0] ** -0.5)
    return model.eval().requires_grad_(False)


def operations(function: Callable[[], Any]) -> int:
    """Count floating point operations of matrix products, attention and convolutions."""

    def packed(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * math.prod(x) * weight[0]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: packed})
    with torch.inference_mode(), counter:
        function()
    return int(counter.get_total_flops())


def product_speed(rows: int, width: int) -> float:
    """Return operations per second of [rows, width] times [width, 4 * width] matrices that exceed the caches."""
    accelerator = Accelerator("cpu")
    count = max(2, 2**26 // width**2 // 4)
    maps = [FrozenLinear(torch.randn(4 * width, width), None, accelerator) for _ in range(count)]
    x = torch.randn(rows, width)
    seconds = []
    with torch.inference_mode():
        for _ in range(5):
            start = time.perf_counter()
            for linear in maps:
                linear(x)
            seconds.append(time.perf_counter() - start)
    return 8 * rows * width**2 * count / min(seconds)


def measure(case: Case) -> dict[str, Any]:
    bench = Bench(case)
    print(f"{case.model}: {case.images} images, {CAPTIONS} captions each, {case.rounds} rounds", flush=True)
    worst = bench.check()
    print(f"  greedy tokens are equal to open_clip's, logits within {worst:.1e}", flush=True)
    result: dict[str, Any] = {"images": case.images, "rounds": case.rounds, "largest difference of a logit": worst}
    cases = bench.measure(case.rounds)
    for name, measured in cases.items():
        lengths = bench.lengths[name]
        bound = bench.bound(lengths)
        times = measured["median seconds"]["ours"]["wall"] / bound["seconds"]
        measured |= {
            "words": float(lengths.mean()),
            "parts": bench.profile(lengths),
            "bound": bound,
            "times the bound": times,
        }
        result[f"speedup_{name}_length"] = measured["speedup"]["wall"]
    return {**result, "cases": cases, "seconds of generate itself": bench.generate()}


def report(name: str, result: dict[str, Any]) -> str:
    """Return the lines of a model, with seconds per caption."""
    lines = []
    for case, measured in result["cases"].items():
        ours, theirs = (of["wall"] / result["images"] / CAPTIONS for of in measured["median seconds"].values())
        ratio = measured["speedup"]
        lines.append(
            f"{name:<14}{case:>9}{measured['words']:>7.1f}{ours:>10.3f}{theirs:>11.3f}{ratio['wall']:>8.1f}"
            f"{ratio['cpu']:>9.1f}{TARGETS[case]:>8.0f}{measured['times the bound']:>9.2f}"
        )
        shares = sorted(measured["parts"].items(), key=lambda part: -part[1])
        total = measured["parts"]["all"]
        lines.append("    " + ", ".join(f"{part} {value / total:.0%}" for part, value in shares if part != "all"))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=[case.model for case in CASES], help="default: all")
    parser.add_argument("--images", type=int, help="images per batch")
    parser.add_argument("--rounds", type=int, help="number of rounds; the median is reported")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="one image, one round; nothing is stored")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {}
    for case in CASES:
        if case.model in (options.model or [case.model]):
            images, rounds = (1, 1) if options.quick else (options.images or case.images, options.rounds or case.rounds)
            results[case.model] = measure(Case(case.model, images, rounds))
    runs = all(result["seconds of generate itself"] is not None for result in results.values())
    about = {
        "threads": options.threads,
        "OMP_WAIT_POLICY": os.environ["OMP_WAIT_POLICY"],
        "open_clip's side": "the loop of CoCa.generate, copied"
        + ("" if runs else f"; generate itself does not run with transformers {transformers.__version__}"),
    }
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    print(
        f"{'model':<14}{'case':>9}{'words':>7}{'ours, s':>10}{'open_clip':>11}{'faster':>8}{'(cpu)':>9}"
        f"{'target':>8}{'x bound':>9}"
    )
    for name, result in results.items():
        print(report(name, result))
    if not options.quick:
        packages = ("torch", "open_clip_torch", "transformers")
        write_results(RESULTS, packages, {**about, "targets": TARGETS, "models": results})
    reached = all(r[f"speedup_{case}_length"] >= target for r in results.values() for case, target in TARGETS.items())
    return 0 if reached or options.quick else 1


if __name__ == "__main__":
    if "OMP_WAIT_POLICY" not in os.environ:  # read when torch is imported, so restart
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})  # noqa: S606
    sys.exit(main())
