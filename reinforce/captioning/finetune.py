"""Fine-tuning of a captioner: builds its pairs, feed and task from a config and runs the training loop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from reinforce import settings
from reinforce.captioning.config import CaptionerConfig
from reinforce.captioning.evaluator import CaptionerEvaluator
from reinforce.captioning.feed import CaptionFeed
from reinforce.captioning.model import build_captioner, check_captioner, describe_parameters
from reinforce.captioning.pairs import PAIRS_FILE, load_pairs
from reinforce.captioning.streams import CaptionStreams, load_streams
from reinforce.captioning.task import CaptioningTask
from reinforce.processes.imports import require
from reinforce.storage import Storage
from reinforce.terminal import plural
from reinforce.training.config import MUTABLE_KEYS, fixed_config
from reinforce.training.distributed import gather
from reinforce.training.distributed.ranks import share_from_first
from reinforce.training.job import Job, model_settings
from reinforce.training.launch import launch, runs_on_ray
from reinforce.training.record.log import LOG
from reinforce.training.record.results import Results
from reinforce.training.record.trackers import check_trackers
from teachers.device.accelerator import Accelerator
from teachers.open_clip.tokenizer import Tokenizer

#: Config keys that may change when a fine-tuning resumes: where it writes, how it is evaluated, how fast it reads.
_MUTABLE_KEYS = (
    "output",
    "evaluate",
    "log",
    *(f"data.{key}" for key in ("threads", "workers", "prefetch", "images_from")),
    *(f"train.{key}" for key in MUTABLE_KEYS),
)
#: Folder of the output with the final weights.
EXPORT = "captioner"
_TEXTS_AT_ONCE = 1024


def finetune(config: CaptionerConfig | str | Path | dict[str, Any], *, address: str | None = None) -> Results:
    """Fine-tune a captioner, from the last checkpoint in ``output`` if there is one.

    Writes the final weights to ``captioner/`` in the output. Runs on the same devices as
    ``reinforce.student.train.train``. Raises UserError for user errors, and ``reinforce.training.stop.Stopped`` after
    a signal.
    """
    config = settings.as_config(CaptionerConfig, config)
    Storage(config.output).check_writable()
    check_captioner(config)
    check_trackers(config.log)
    if config.evaluate.captioned != 0:
        require("train", "evaluate.captioned (BLEU and CIDEr)", "sacrebleu")
    if config.data.order == "streams":
        load_streams(config, 1)  # count the data once, before the ranks start
    else:
        load_pairs(config)  # scan it
    job = Job(
        training=config.train,
        output=config.output,
        seed=config.seed,
        fixed_config=fixed_config(config, _MUTABLE_KEYS),
        evaluate_every=config.evaluate.every,
        evaluate_start=True,
        best=config.evaluate.best_metric,
        export_best=config.evaluate.export == "best",
        export=EXPORT,
        trackers=config.log,
        model_config=model_settings(config.captioner.model),
    )
    if runs_on_ray(job, address):
        build_captioner(config)  # report its faults before Ray starts
    return launch(partial(build, config), job, address)


def build(config: CaptionerConfig, accelerator: Accelerator) -> tuple[CaptioningTask, CaptionFeed | CaptionStreams]:
    """Build the task and the feed of one rank, with the model on the CPU. Raises UserError."""
    model = build_captioner(config)
    context = None if config.captioner.context is None else model.coca.text.context_length
    tokenize = Tokenizer(model.name, context)
    end = int(tokenize([""])[0, 1])
    feed: CaptionFeed | CaptionStreams
    if config.data.order == "streams":
        streamed, held_out = share_from_first(lambda: load_streams(config, model.image.height))
        feed = CaptionStreams(streamed, tokenize, end, pin=accelerator.device.type == "cuda")
        captions = held_out.all_captions()  # others are not read before the training
        trained = f"{feed.samples:,} examples in {len(streamed.groups):,} groups of streams"
    else:
        pairs = load_pairs(config)
        training, held_out, captions = pairs.training(), pairs.held_out(), pairs.all_captions()
        feed = CaptionFeed(training, config.data, config.seed, model.image.height, tokenize, end)
        trained = f"{plural(len(training), 'image')} with {training.caption_counts().sum():,} captions"
    sample = held_out.shuffled(config.seed).first(config.evaluate.images)
    evaluator = CaptionerEvaluator(sample, config, tokenize, end)
    notes = []
    if gather.rank() == 0:
        kept = f"{plural(len(held_out), 'image')} with {held_out.caption_counts().sum():,} captions held out"
        notes = [describe_parameters(model), f"training on {trained}; {kept} (column `held_out` of {PAIRS_FILE})"]
        if truncated := count_truncated(captions, model.name, context):
            notes.append(
                f"{truncated:,} of {len(captions):,} captions are longer than the model's context and truncated"
            )
    return CaptioningTask(model, config.loss, evaluator, notes), feed


def format_comparison(results: Results) -> str:
    """Format the metrics of the held-out images before and after the fine-tuning, one line per metric."""
    store = Storage(results.output)
    rows = [json.loads(line) for line in store.fs.cat_file(store.path(LOG)).splitlines()]
    before: dict[str, float] = next((row["metrics"] for row in rows if "metrics" in row and row["step"] == 0), {})
    return "\n".join(
        f"{name:<28} {before[name]:8.4f} -> {after:8.4f}" for name, after in results.metrics.items() if name in before
    )


def count_truncated(captions: Sequence[str], model: str, context: int | None = None) -> int:
    """Count the captions that an open_clip model truncates, because they have more tokens than its context.

    ``context`` replaces that of the model.
    """
    import open_clip

    from teachers.open_clip.text import disable_special_tokens

    tokenizer = disable_special_tokens(open_clip.get_tokenizer(model, context))
    [empty] = tokenizer([""])
    length, end = len(empty), int(empty[1])
    longer = [caption for caption in captions if len(caption.encode()) > length - 2]  # a token has at least one byte
    truncated = 0
    for start in range(0, len(longer), _TEXTS_AT_ONCE):
        # with one more position, a longer text is truncated there and has the end token at the last position
        tokens = tokenizer(longer[start : start + _TEXTS_AT_ONCE], context_length=length + 1)
        truncated += int((tokens[:, length] == end).sum())
    return truncated
