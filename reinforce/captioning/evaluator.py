"""Similarity of generated captions to reference captions: CIDEr-D."""

from __future__ import annotations

import logging
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch.nn.functional import cross_entropy, normalize

from reinforce.captioning.config import CaptionerConfig
from reinforce.captioning.data import HeldOutImages, predicted_lengths
from reinforce.captioning.model import CaptionerModel
from reinforce.errors import UserError
from reinforce.evaluation.encoding import NOT_FINITE_FIX, NotFinite
from reinforce.evaluation.ranking import compute_recalls
from reinforce.evaluation.reading import CacheBudget, ImageBatches, LabelledImage
from reinforce.explore.captions import bleu
from reinforce.processes.cores import available_cores
from reinforce.student.data.stream import Tokenize
from reinforce.terminal import first_names
from teachers.coca.captioner import CocaCaptioner
from teachers.fast_paths.usage import in_force, loading
from teachers.open_clip.building import write_open_clip
from teachers.open_clip.text import tokenizer_of
from teachers.pixels import to_pixels
from teachers.protocols import ImageSpec
from teachers.runtime.accelerator import Accelerator, widest_float

_MAX_N = 4
_SIGMA = 6.0

#: Counts of the n-grams of a text, for n = 1 .. 4.
NGrams = list[Counter[tuple[str, ...]]]


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D (arXiv 1411.5726) of one caption per image against one or more references each, between 0 and 10.

    Inverse document frequencies come from the given references, so values of different sets do not compare, and a
    single image scores 0. Papers report it times 100. It equals pycocoevalcap's value for the same words; the words
    are those of sacrebleu's ``13a`` in lower case without punctuation, close to COCO's tokenizer, which needs Java.
    """
    candidates = [_ngrams(text) for text in captions]
    reference_sets = [[_ngrams(text) for text in texts] for texts in references]
    document_counts: Counter[tuple[str, ...]] = Counter()
    for texts in reference_sets:
        document_counts.update({gram for reference in texts for counts in reference for gram in counts})
    log_images = math.log(len(reference_sets))

    def tf_idf(grams: NGrams) -> list[dict[tuple[str, ...], float]]:
        return [
            {gram: count * (log_images - math.log(max(1, document_counts[gram]))) for gram, count in counts.items()}
            for counts in grams
        ]

    scores = []
    for grams, texts in zip(candidates, reference_sets, strict=True):
        vector = tf_idf(grams)
        similarities = []  # to each reference: mean over n of the clipped cosine, with a penalty for excess words
        for text in texts:
            cosines = []
            for a, b in zip(vector, tf_idf(text), strict=True):
                norms = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
                dot = sum(min(value, b[gram]) * b[gram] for gram, value in a.items() if gram in b)
                cosines.append(dot / norms if norms else 0.0)
            excess = sum(grams[0].values()) - sum(text[0].values())
            similarities.append(float(np.mean(cosines)) * math.exp(-(excess**2) / (2 * _SIGMA**2)))
        scores.append(np.mean(similarities))
    return 10 * float(np.mean(scores))


def _ngrams(text: str) -> NGrams:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    words = [word for word in Tokenizer13a()(text.lower()).split() if any(c.isalnum() for c in word)]
    return [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in range(1, _MAX_N + 1)]


#: Bytes of decoded held-out images that are kept between evaluations.
_CACHE_BYTES = 2 * 2**30
_LOGGED_CAPTIONS = 5
_MODEL = "model"
_CAPTIONER = "captioner"  # in the counts of fast paths

_log = logging.getLogger(__name__)


@dataclass
class _Totals:
    """Sums and embeddings collected in one pass over the held-out images."""

    nll: float = 0.0
    hits: int = 0
    tokens: int = 0
    contrastive: list[tuple[float, int]] = field(default_factory=list)  # loss and image count of each batch
    images: list[torch.Tensor] = field(default_factory=list)
    texts: list[torch.Tensor] = field(default_factory=list)
    text_owners: list[int] = field(default_factory=list)  # image index of each text
    count: int = 0
    finite: NotFinite = field(default_factory=NotFinite)


class CaptionerEvaluator:
    """Computes metrics of a model on held-out images.

    - ``caption_loss``: cross-entropy in nats per token, over all captions of all images, unweighted;
      ``token_accuracy``: share of tokens for which the true next token is the likeliest.
    - ``contrastive_loss``: CLIP's, over batches of ``evaluate.batch`` images with the first caption of each; chance is
      ``log batch``. Images after the last full batch are not included.
    - ``retrieval/text_to_image/r1`` etc.: among all of these images and captions, by CoCa's image and text towers.
    - ``cider`` and ``bleu``: of captions generated as in a run, see ``cider`` and ``bleu``.

    Those of embeddings or logits that are not finite are NaN, with a line in the log.
    """

    def __init__(self, held_out: HeldOutImages, config: CaptionerConfig, tokenize: Tokenize, end: int) -> None:
        self._held_out = held_out
        self._config = config.evaluate
        self._precision = config.train.compute.precision
        self._tokenize = tokenize
        self._end = end
        self._threads = available_cores()
        self._images = ImageBatches(self._examples, len(held_out), config.data.limits, CacheBudget(_CACHE_BYTES))

    def evaluate(self, model: CaptionerModel) -> dict[str, float]:
        """Return metrics of a model in eval mode, on its device. Raises UserError if no image can be decoded."""
        accelerator = Accelerator(str(next(model.parameters()).device), self._precision)
        totals = _Totals()
        with accelerator.forward():
            for images, rows in self._batches(model.image, accelerator, len(self._held_out)):
                self._add_batch(model, images, rows, totals)
        if not totals.count:
            refused = self._images.refused[0]
            raise UserError(
                f"held_out: no image can be decoded, the first: {refused.key}: {refused.detail}. Check the shards."
            )
        full = [batch for batch in totals.contrastive if batch[1] == self._config.batch] or totals.contrastive
        known = math.isfinite(totals.nll)
        metrics = {
            "caption_loss": totals.nll / totals.tokens,
            "token_accuracy": totals.hits / totals.tokens if known else math.nan,
            "contrastive_loss": sum(loss for loss, _ in full) / len(full),
        }
        pairs = np.array([totals.text_owners, np.arange(len(totals.text_owners))], np.int64)
        recalls = compute_recalls(torch.cat(totals.images), torch.cat(totals.texts), pairs, accelerator)
        fault = totals.finite.describe(_MODEL)
        if fault:
            _log.warning("held out: retrieval has no metrics: %s. %s", fault, NOT_FINITE_FIX)
        metrics |= {f"retrieval/{name}": math.nan if fault else value for name, value in recalls.items()}
        if not known:
            _log.warning("held out: the losses of captions are not finite. %s", NOT_FINITE_FIX)
        if self._config.captioned != 0:
            metrics |= {"cider": math.nan, "bleu": math.nan}
            captions = self.generate_captions(model, accelerator) if known else {}
            if missing := [self._held_out.keys[row] for row, text in captions.items() if text is None]:
                _log.warning("held out: the logits of %s are not finite. %s", first_names(missing), NOT_FINITE_FIX)
            elif captions:
                for row, text in list(captions.items())[:_LOGGED_CAPTIONS]:
                    _log.info("held out: %s: %s", self._held_out.keys[row], text)
                texts = [text or "" for text in captions.values()]
                references = [self._held_out.captions[row] for row in captions]
                metrics |= {"cider": cider(texts, references), "bleu": bleu(texts, references)}
        return metrics

    def _add_batch(self, model: CaptionerModel, images: torch.Tensor, rows: Sequence[int], totals: _Totals) -> None:
        captions = [self._held_out.captions[row] for row in rows]
        vectors, image_tokens = model.coca._encode_image(images, normalize=False)
        owners = [index for index, texts in enumerate(captions) for _ in texts]
        flat = [text for texts in captions for text in texts]
        features = []
        for start in range(0, len(flat), self._config.batch):
            part = slice(start, start + self._config.batch)
            tokens = self._tokenize(flat[part])
            lengths = predicted_lengths(tokens, self._end)
            tokens = tokens.to(images.device)
            latents, text_tokens = model.coca._encode_text(tokens, normalize=False)
            predictions = model.predict(image_tokens[owners[part]], text_tokens, tokens, lengths)
            features.append(normalize(latents.float(), dim=-1))
            totals.nll += float(predictions.nll().sum(dtype=widest_float(images.device)))
            totals.hits += int(predictions.hits().sum())
            totals.tokens += sum(lengths)
        image_features, text_features = normalize(vectors.float(), dim=-1), torch.cat(features)
        firsts = np.cumsum([0, *(len(texts) for texts in captions)])[:-1].tolist()
        # CLIP's loss of one batch on this rank; the task's loss would wait for the other ranks.
        with torch.autocast(images.device.type, enabled=False):
            logits = model.coca.logit_scale.exp() * image_features @ text_features[firsts].T
        labels = torch.arange(len(rows), device=images.device)
        loss = float(cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
        totals.contrastive.append((loss, len(rows)))
        totals.finite.add(_MODEL, "image", image_features)
        totals.finite.add(_MODEL, "text", text_features)
        totals.images.append(image_features.cpu())
        totals.texts.append(text_features.cpu())
        totals.text_owners += [totals.count + owner for owner in owners]
        totals.count += len(rows)

    def generate_captions(self, model: CaptionerModel, accelerator: Accelerator) -> dict[int, str | None]:
        """Return one caption per held-out image by row, generated by a run's captioner from exported weights.

        None for an image whose logits are not finite.
        """
        with tempfile.TemporaryDirectory(prefix="reinforce-captioner-") as folder:
            write_open_clip(model.coca, model.config, tokenizer_of(model.name), folder)
            spec = in_force(self._config.generate.captioner(f"local-dir:{folder}"))
            with loading(_CAPTIONER):
                captioner = CocaCaptioner(spec, accelerator)
        captions: dict[int, str | None] = {}
        limit = self._config.captioned or len(self._held_out)
        for images, rows in self._batches(captioner.image, accelerator, limit):
            texts = captioner.caption(images, np.zeros((len(rows), 1), np.uint64))  # no strategy here samples
            captions |= {row: None if text is None else text[0] for row, text in zip(rows, texts, strict=True)}
        return captions

    def _batches(
        self, spec: ImageSpec, accelerator: Accelerator, limit: int
    ) -> Iterator[tuple[torch.Tensor, list[int]]]:
        """Yield pixels and rows of the first ``limit`` images that can be decoded."""
        for (pixels,), targets in self._images.decode([spec], self._config.batch, self._threads):
            rows = targets[:limit]
            yield to_pixels(accelerator.put(pixels[: len(rows)]), spec), rows
            limit -= len(rows)
            if not limit:
                return

    def _examples(self) -> Iterator[LabelledImage]:
        images = zip(self._held_out.keys, self._held_out.images(), strict=True)
        for row, (key, image) in enumerate(images):
            yield LabelledImage(key, partial(bytes, image), row)
