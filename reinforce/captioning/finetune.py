"""The fine-tuning of a captioner as a task of the training loop, with CoCa's loss (arXiv 2205.01917).

    L = contrastive * L_CLIP + caption * sum_b nll_b / sum_b tokens_b

As in open_clip's CoCaLoss the second term is a mean over tokens, not over captions. Here the mean is over the tokens of
the global batch, for any number of ranks and microbatches. Tokens are selected by position, up to the end token, while
open_clip masks its padding by value: the value is 0, which is also the token of "!". (CoCa's text tower masks by value
too. That is part of the model, in training and inference, and is not changed.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from reinforce import settings
from reinforce.captioning.config import CaptionerConfig, Loss
from reinforce.captioning.data import HELD_OUT_FILE, CaptionStreams, HeldOutImages, StreamedPairs, load_streams
from reinforce.captioning.evaluator import CaptionerEvaluator
from reinforce.captioning.model import CaptionerModel, build_captioner, check_captioner, describe_parameters
from reinforce.processes.imports import require
from reinforce.storage import Storage
from reinforce.student.terms.pairs import Objective, contrastive_losses
from reinforce.terminal import plural
from reinforce.training import gather
from reinforce.training.config import make_job
from reinforce.training.launch import launch, runs_on_ray
from reinforce.training.log import check_trackers, read_rows
from reinforce.training.ranks import share_from_first
from reinforce.training.results import Results
from reinforce.training.task import Batch, Encoded, Task
from teachers.open_clip.building import write_open_clip
from teachers.open_clip.text import Tokenizer, tokenizer_of
from teachers.runtime.accelerator import Accelerator

#: CLIP's loss without distillation.
_CLIP = Objective(lambda_=0.0)


class CaptioningTask(Task):
    """CoCa's two losses, and an evaluator of held-out images. Batches have the lengths of their captions."""

    def __init__(
        self, model: CaptionerModel, loss: Loss, evaluator: CaptionerEvaluator, notes: Sequence[str] = ()
    ) -> None:
        self.model, self.notes = model, notes
        self._loss, self._evaluator = loss, evaluator

    def losses(self, encoded: Encoded, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the weighted ``contrastive`` and ``caption`` losses of a rank's b samples, without those of weight 0.

        ``image`` and ``text`` are unit-norm [b, D], ``nll`` [b] is summed over the ``length`` [b] tokens of each
        caption. The mean over the ranks is the loss of the global batch.
        """
        losses, weights, features = {}, self._loss, encoded.features
        if weights.contrastive:
            pairs = {name: features[name] for name in ("image", "text")}
            [clip] = contrastive_losses(_CLIP, pairs, encoded.scalars["logit_scale"], None, {}).values()
            losses["contrastive"] = weights.contrastive * clip
        if weights.caption:
            nll = features["nll"]
            tokens = torch.full((), float(sum(batch["length"])), device=nll.device)  # a copy from the host would wait
            losses["caption"] = weights.caption * nll.sum() / gather.mean(tokens)
        return losses

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        """Return metrics of the held-out images; see ``reinforce.captioning.evaluator``."""
        assert isinstance(model, CaptionerModel)
        return self._evaluator.evaluate(model)

    def export(self, model: torch.nn.Module, folder: str) -> None:
        """Write a folder that open_clip and a run's ``captioners:`` load as ``local-dir:FOLDER``."""
        assert isinstance(model, CaptionerModel)
        write_open_clip(model.coca, model.config, tokenizer_of(model.name), folder)


#: Keys that may change when a fine-tuning resumes: how fast it reads.
_READING = ("data.workers", "data.prefetch", "data.images_from")
#: Folder of the output with the final weights.
EXPORT = "captioner"
_TEXTS_AT_ONCE = 1024
#: What is trained on, and the held-out images.
_Data: TypeAlias = "tuple[StreamedPairs, HeldOutImages]"


def finetune(config: CaptionerConfig | str | Path | dict[str, Any], *, address: str | None = None) -> Results:
    """Fine-tune a captioner, from the last checkpoint in ``output`` if there is one.

    Writes the final weights to ``captioner/`` in the output. Runs on the same devices as
    ``reinforce.student.train.train``. Raises UserError for user errors, and
    ``reinforce.processes.signals.Stopped`` after a signal.
    """
    config = settings.as_config(CaptionerConfig, config)
    Storage(config.output).check_writable()
    check_captioner(config)
    check_trackers(config.log)
    if config.evaluate.captioned != 0:
        require("train", "evaluate.captioned (BLEU and CIDEr)", "sacrebleu")
    job = make_job(config, [config.captioner.model], _READING, evaluate_start=True, export=EXPORT)
    data = None
    if runs_on_ray(job, address):  # faults are reported before Ray starts
        data = load_streams(config, build_captioner(config).image.height)
    return launch(partial(build, config, data=data), job, address)


def build(
    config: CaptionerConfig, accelerator: Accelerator, data: _Data | None = None
) -> tuple[CaptioningTask, CaptionStreams]:
    """Build the task and the feed of one rank, with the model on the CPU. Raises UserError.

    Without ``data``, rank 0 lists and counts what is trained on, for all.
    """
    model = build_captioner(config)
    context = None if config.captioner.context is None else model.coca.text.context_length
    tokenize = Tokenizer(model.name, context)
    end = int(tokenize([""])[0, 1])
    training, held_out = data or share_from_first(partial(load_streams, config, model.image.height))
    feed = CaptionStreams(training, tokenize, end, pin=accelerator.device.type == "cuda")
    evaluator = CaptionerEvaluator(held_out, config, tokenize, end)
    notes = []
    if gather.rank() == 0:
        captions = [caption for texts in held_out.captions for caption in texts]
        trained = f"{plural(feed.samples, 'example')} in {plural(len(training.groups), 'group')} of streams"
        kept = f"{plural(len(held_out), 'image')} with {len(captions):,} captions held out ({HELD_OUT_FILE})"
        notes = [describe_parameters(model), f"training on {trained}; {kept}"]
        if truncated := count_truncated(captions, model.name, context):
            of = f"{truncated:,} of {len(captions):,} held-out captions"
            notes.append(f"{of} are longer than the model's context and truncated")
    return CaptioningTask(model, config.loss, evaluator, notes), feed


def format_comparison(results: Results) -> str:
    """Format the metrics of the held-out images before and after the fine-tuning, one line per metric."""
    rows = read_rows(Storage(results.output))
    before: dict[str, float] = next((row["metrics"] for row in rows if "metrics" in row and row["step"] == 0), {})
    return "\n".join(
        f"{name:<28} {before[name]:8.4f} -> {after:8.4f}" for name, after in results.metrics.items() if name in before
    )


def count_truncated(captions: Sequence[str], model: str, context: int | None = None) -> int:
    """Count the captions that an open_clip model truncates, because they have more tokens than its context.

    ``context`` replaces that of the model.
    """

    from teachers.open_clip.text import disable_special_tokens, tokenizer_of

    tokenizer = disable_special_tokens(tokenizer_of(model, context))
    [empty] = tokenizer([""])
    length, end = len(empty), int(empty[1])
    longer = [caption for caption in captions if len(caption.encode()) > length - 2]  # a token has at least one byte
    truncated = 0
    for start in range(0, len(longer), _TEXTS_AT_ONCE):
        # with one more position, a longer text is truncated there and has the end token at the last position
        tokens = tokenizer(longer[start : start + _TEXTS_AT_ONCE], context_length=length + 1)
        truncated += int((tokens[:, length] == end).sum())
    return truncated
