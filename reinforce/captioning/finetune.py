"""Fine-tuning a captioner: its config, pairs, feed and task put together for the loop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from reinforce import settings
from reinforce.captioning.config import CaptionerConfig, load_captioner_config
from reinforce.captioning.feed import CaptionFeed
from reinforce.captioning.judge import Judge
from reinforce.captioning.model import build_captioner, check_captioner, describe
from reinforce.captioning.pairs import FILE, Pairs, find_pairs
from reinforce.captioning.task import CaptioningTask
from reinforce.storage import Storage
from reinforce.training import gather
from reinforce.training.config import MUTABLE_KEYS, fixed_config
from reinforce.training.job import Job
from reinforce.training.launch import launch, runs_on_ray
from reinforce.training.log import LOG
from reinforce.training.results import Results
from teachers.device import Accelerator
from teachers.open_clip_tokens import Tokenizer

#: Keys that may change when a fine-tuning goes on: where it writes, how it is judged, how fast it reads.
_FREE = ("output", "evaluate", "data.threads", *(f"train.{key}" for key in MUTABLE_KEYS))
#: Folder of the output with the result.
EXPORT = "captioner"
_TEXTS = 1024  # tokenized at once


def finetune(config: CaptionerConfig | str | Path | dict[str, Any], *, address: str | None = None) -> Results:
    """Fine-tune a captioner to its end, from the last checkpoint in ``output`` if there is one.

    The result is the folder ``captioner/`` of the output. Runs where ``reinforce.student.train.train`` would. Raises
    UserError for what the user has to mend, and ``reinforce.training.stop.Stopped`` after a signal.
    """
    config = _as_config(config)
    Storage(config.output).check_writable()
    check_captioner(config)
    find_pairs(config)  # once, before several ranks want them
    job = Job(
        training=config.train,
        output=config.output,
        seed=config.seed,
        fixed_config=fixed_config(config, _FREE),
        evaluate_every=config.evaluate.every,
        evaluate_start=True,
        best=config.evaluate.best_metric,
        export=EXPORT,
    )
    if runs_on_ray(job, address):
        build_captioner(config)  # to tell its faults before Ray starts
    return launch(partial(build, config), job, address)


def build(config: CaptionerConfig, accelerator: Accelerator) -> tuple[CaptioningTask, CaptionFeed]:
    """The task and the feed of one rank, the model on the CPU. Raises UserError for what does not fit together."""
    model = build_captioner(config)
    pairs = find_pairs(config)
    tokenize = Tokenizer(model.name)
    end = int(tokenize([""])[0, 1])
    learnt, held_out = pairs.learnt(), pairs.held_out().shuffled(config.seed).first(config.evaluate.images)
    feed = CaptionFeed(learnt, config.data, config.seed, model.image.height, tokenize, end)
    judge = Judge(held_out, config, tokenize, end)
    notes = [describe(model), *_notes(pairs, model.name)] if gather.rank() == 0 else []
    return CaptioningTask(model, config.loss, judge, notes), feed


def comparison(results: Results) -> str:
    """Metrics of the held-out images before and after, a line each."""
    store = Storage(results.output)
    rows = [json.loads(line) for line in store.fs.cat_file(store.path(LOG)).splitlines()]
    before: dict[str, float] = next((row["metrics"] for row in rows if "metrics" in row and row["step"] == 0), {})
    return "\n".join(
        f"{name:<28} {before[name]:8.4f} -> {after:8.4f}" for name, after in results.metrics.items() if name in before
    )


def cut_captions(captions: Sequence[str], model: str) -> int:
    """How many captions have more tokens than the context of an open_clip model, which cuts them."""
    import open_clip

    from teachers.open_clip_text import disable_special_tokens

    tokenizer = disable_special_tokens(open_clip.get_tokenizer(model))
    [empty] = tokenizer([""])
    context, end = len(empty), int(empty[1])
    longer = [caption for caption in captions if len(caption.encode()) > context - 2]  # a token has a byte or more
    cut = 0
    for start in range(0, len(longer), _TEXTS):
        # with one more place than there is, a text that is longer still has its end there
        tokens = tokenizer(longer[start : start + _TEXTS], context_length=context + 1)
        cut += int((tokens[:, context] == end).sum())
    return cut


def _notes(pairs: Pairs, model: str) -> list[str]:
    """How much there is to learn and to judge by, and what does not fit."""
    learnt, held_out = pairs.learnt(), pairs.held_out()
    notes = [
        f"{len(learnt):,} images with {learnt.counts().sum():,} captions to learn from, {len(held_out):,} with "
        f"{held_out.counts().sum():,} held out (which: `held_out` in {FILE})"
    ]
    captions = [caption for texts in pairs.table["captions"].to_pylist() for caption in texts]
    if cut := cut_captions(captions, model):
        notes.append(f"{cut:,} of {len(captions):,} captions are longer than the model's context and are cut")
    return notes


def _as_config(config: CaptionerConfig | str | Path | dict[str, Any]) -> CaptionerConfig:
    if isinstance(config, CaptionerConfig):
        return config
    return settings.parse(CaptionerConfig, config) if isinstance(config, dict) else load_captioner_config(config)
