"""How good a captioner is on images it has never learnt from."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import open_clip
import torch
from torch.nn.functional import cross_entropy, normalize

from reinforce.captioning.config import CaptionerConfig
from reinforce.captioning.feed import Tokenize, predicted
from reinforce.captioning.images import read_images
from reinforce.captioning.metrics import bleu, cider
from reinforce.captioning.model import CaptionerModel
from reinforce.captioning.pairs import Pairs
from reinforce.errors import UserError
from reinforce.evaluation.pictures import Memory, Pictures
from reinforce.evaluation.ranking import recalls
from reinforce.evaluation.reading import Example
from teachers.coca import CocaCaptioner
from teachers.device import Accelerator
from teachers.export import write_open_clip
from teachers.pixels import to_pixels
from teachers.protocols import ImageSpec

#: Decoded held-out images that are kept between evaluations, in bytes.
_MEMORY = 2 * 2**30
_SHOWN = 5  # captions in the log

_log = logging.getLogger(__name__)


@dataclass
class _Seen:
    """What one pass over the held-out images adds up to."""

    nll: float = 0.0
    hits: int = 0
    tokens: int = 0
    contrastive: list[tuple[float, int]] = field(default_factory=list)  # loss and images of each whole batch
    images: list[torch.Tensor] = field(default_factory=list)
    texts: list[torch.Tensor] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)  # image of each text
    count: int = 0


class Judge:
    """Measures a model on held-out images, as often as wanted.

    - ``caption_loss``: cross-entropy in nats a token, over all captions of all images, unweighted;
      ``token_accuracy``: how often the true next token was the likeliest.
    - ``contrastive_loss``: CLIP's, over batches of ``evaluate.batch`` images with the first caption of each; ``log
      batch`` is chance. Images behind the last whole batch are not in it.
    - ``retrieval/text_to_image/r1`` and so on: among all of these images and captions, by CoCa's own two towers.
    - ``cider`` and ``bleu``: of captions made as a run would make them, see ``reinforce.captioning.metrics``.
    """

    def __init__(self, pairs: Pairs, config: CaptionerConfig, tokenize: Tokenize, end: int) -> None:
        self._pairs = pairs
        self._evaluation = config.evaluate
        self._precision = config.train.compute.precision
        self._tokenize = tokenize
        self._end = end
        self._threads = config.data.threads
        self._pictures = Pictures(self._examples, len(pairs), config.data.limits, Memory(_MEMORY))

    def __call__(self, model: CaptionerModel) -> dict[str, float]:
        """Metrics by name, for a model on its device in eval mode. Raises UserError where no image can be decoded."""
        accelerator = Accelerator(str(next(model.parameters()).device), self._precision)
        seen = _Seen()
        with accelerator.forward():
            for images, rows in self._batches(model.image, accelerator, len(self._pairs)):
                self._look(model, images, rows, seen)
        if not seen.count:
            refused = self._pictures.refused[0]
            raise UserError(f"held_out: no image can be decoded, the first: {refused.key}: {refused.detail}.")
        whole = [part for part in seen.contrastive if part[1] == self._evaluation.batch] or seen.contrastive
        metrics = {
            "caption_loss": seen.nll / seen.tokens,
            "token_accuracy": seen.hits / seen.tokens,
            "contrastive_loss": sum(loss for loss, _ in whole) / len(whole),
        }
        pairs = np.array([seen.owners, np.arange(len(seen.owners))], np.int64)
        found = recalls(torch.cat(seen.images), torch.cat(seen.texts), pairs, accelerator)
        metrics |= {f"retrieval/{name}": value for name, value in found.items()}
        if self._evaluation.captioned != 0:
            metrics |= self._scores(model, accelerator)
        return metrics

    def _look(self, model: CaptionerModel, images: torch.Tensor, rows: Sequence[int], seen: _Seen) -> None:
        texts = [self._pairs.captions(row) for row in rows]
        vectors, image_tokens = model.coca._encode_image(images, normalize=False)
        owners = [place for place, captions in enumerate(texts) for _ in captions]
        flat = [caption for captions in texts for caption in captions]
        features = []
        for start in range(0, len(flat), self._evaluation.batch):
            part = slice(start, start + self._evaluation.batch)
            tokens = self._tokenize(flat[part])
            length = predicted(tokens, self._end)
            tokens = tokens.to(images.device)
            latents, text_tokens = model.coca._encode_text(tokens, normalize=False)
            made = model.predict(image_tokens[owners[part]], text_tokens, tokens, length)
            features.append(normalize(latents.float(), dim=-1))
            seen.nll += float(made.nll().double().sum())
            seen.hits += int(made.hits().sum())
            seen.tokens += sum(length)
        of_images, of_texts = normalize(vectors.float(), dim=-1), torch.cat(features)
        firsts = np.cumsum([0, *(len(captions) for captions in texts)])[:-1].tolist()
        seen.contrastive.append((_contrastive(of_images, of_texts[firsts], model.coca.logit_scale.exp()), len(rows)))
        seen.images.append(of_images.cpu())
        seen.texts.append(of_texts.cpu())
        seen.owners += [seen.count + owner for owner in owners]
        seen.count += len(rows)

    def _scores(self, model: CaptionerModel, accelerator: Accelerator) -> dict[str, float]:
        captions = self.captions(model, accelerator)
        for row, text in list(captions.items())[:_SHOWN]:
            _log.info("held out: %s: %s", self._pairs.key(row), text)
        texts, references = list(captions.values()), [self._pairs.captions(row) for row in captions]
        return {"cider": cider(texts, references), "bleu": bleu(texts, references)}

    def captions(self, model: CaptionerModel, accelerator: Accelerator) -> dict[int, str]:
        """One caption of each held-out image by its row, by the captioner of a run, from the files it would load."""
        with tempfile.TemporaryDirectory(prefix="reinforce-captioner-") as folder:
            write_open_clip(model.coca, model.config, open_clip.get_tokenizer(model.name), folder)
            captioner = CocaCaptioner(self._evaluation.generate.captioner(f"local-dir:{folder}"), accelerator)
        made: dict[int, str] = {}
        limit = self._evaluation.captioned or len(self._pairs)
        for images, rows in self._batches(captioner.image, accelerator, limit):
            texts = captioner.caption(images, np.zeros((len(rows), 1), np.uint64))  # nothing is drawn
            made |= {row: text[0] if text else "" for row, text in zip(rows, texts, strict=True)}
        return made

    def _batches(
        self, spec: ImageSpec, accelerator: Accelerator, limit: int
    ) -> Iterator[tuple[torch.Tensor, list[int]]]:
        """Pixels of the first ``limit`` images that can be decoded, with their rows."""
        for batch in self._pictures.batches(spec, self._evaluation.batch, self._threads):
            rows = batch.targets[:limit]
            yield to_pixels(accelerator.put(batch.pixels[: len(rows)]), spec), rows
            limit -= len(rows)
            if not limit:
                return

    def _examples(self) -> Iterator[Example]:
        for row in range(len(self._pairs)):
            yield Example(self._pairs.key(row), partial(_load, self._pairs, row), row)


def _contrastive(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> float:
    """CLIP's loss of one batch on this rank alone; the task's would wait for the others."""
    with torch.autocast(images.device.type, enabled=False):
        logits = scale * images @ texts.T
    pairs = torch.arange(len(images), device=images.device)
    return float(cross_entropy(logits, pairs) + cross_entropy(logits.T, pairs)) / 2


def _load(pairs: Pairs, row: int) -> bytes:
    [data] = read_images([pairs.place(row)])
    return data
