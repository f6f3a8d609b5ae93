"""A CoCa in training: the features that its forward pass returns for the loss, and its trainable parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import open_clip
import torch
from torch.nn.functional import cross_entropy, normalize
from torch.utils.checkpoint import checkpoint

from reinforce.captioning.config import TOWERS, CaptionerConfig, Loss, Tower
from reinforce.errors import UserError
from reinforce.training.task import Batch, Encoded
from teachers.coca.captioner import check_max_length, check_model, set_context
from teachers.open_clip import catalog
from teachers.open_clip.catalog import check_coca
from teachers.open_clip.teacher import image_spec, load_model, model_name, random_model
from teachers.pixels import to_pixels
from teachers.protocols import ImageSpec
from teachers.runtime.accelerator import upload

#: CoCa modules by their names in configs.
_MODULES: Mapping[Tower, str] = {"image": "visual", "text": "text", "decoder": "text_decoder"}


@dataclass(frozen=True)
class TokenPredictions:
    """Logits [n, vocabulary] of the n predicted tokens of a batch; ``labels`` int64 [n] are the true tokens.

    ``positions`` [n] are their indices in the flattened captions of ``shape`` (b, longest).
    """

    logits: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    shape: tuple[int, int]

    def nll(self) -> torch.Tensor:
        """Return -log P of each token, float32 [n]."""
        return cross_entropy(self.logits.float(), self.labels, reduction="none")

    def caption_nll(self) -> torch.Tensor:
        """Return -log P of each caption, float32 [b]."""
        nll = self.nll()
        # each position is written once; a scatter-add would depend on the thread order on CUDA
        return nll.new_zeros(self.shape).flatten().index_copy(0, self.positions, nll).view(self.shape).sum(dim=1)

    def hits(self) -> torch.Tensor:
        """Return whether the true token is the likeliest, bool [n]."""
        return self.logits.argmax(dim=-1) == self.labels


class CaptionerModel(torch.nn.Module):
    """An open_clip CoCa in training.

    ``coca`` is the model itself, ``config`` its ``model_cfg``, ``name`` its open_clip name. Parameters of frozen
    towers, and those that the loss does not depend on, are not trained; frozen towers stay in eval mode.
    """

    def __init__(
        self,
        name: str,
        coca: Any,
        config: Mapping[str, Any],
        image: ImageSpec,
        loss: Loss,
        frozen: Sequence[Tower] = (),
    ) -> None:
        super().__init__()
        self.name = name
        self.coca = coca
        self.config = config
        self.image = image
        self.loss = loss
        self.frozen = tuple(frozen)
        for tower in self.frozen:
            self.tower(tower).requires_grad_(False)
        self._freeze_unused_parameters()

    def tower(self, tower: Tower) -> torch.nn.Module:
        module: torch.nn.Module = getattr(self.coca, _MODULES[tower])
        return module

    def train(self, mode: bool = True) -> CaptionerModel:
        super().train(mode)
        for tower in self.frozen:
            self.tower(tower).eval()
        return self

    def forward(self, batch: Batch) -> Encoded:
        """Return the features of the losses with non-zero weight, for b samples (see ``captioning.feed``).

        ``image`` and ``text`` float32 [b, D], unit norm; ``nll`` float32 [b], the sum over a caption's tokens of
        -log P(token | the image, the tokens before).
        """
        images, image_tokens = self.coca._encode_image(to_pixels(batch["image"], self.image), normalize=False)
        texts, text_tokens = self.coca._encode_text(batch["caption"], normalize=False)
        features = {}
        if self.loss.contrastive:
            features = {"image": normalize(images.float(), dim=-1), "text": normalize(texts.float(), dim=-1)}
        if self.loss.caption:
            predictions = self.predict(image_tokens, text_tokens, batch["caption"], batch["length"])
            features["nll"] = predictions.caption_nll()
        return Encoded(features, scalars={"logit_scale": self.coca.logit_scale.exp().reshape(())})

    def predict(
        self, image_tokens: torch.Tensor, text_tokens: torch.Tensor, caption: torch.Tensor, length: Sequence[int]
    ) -> TokenPredictions:
        """Predict the first ``length`` [b] tokens after the start of captions int64 [b, context].

        As in open_clip's forward, position i of the decoder, which attends to the tokens up to i, predicts token i + 1.
        Positions after the longest caption are not computed, and padding is removed before the projection to the
        vocabulary, which makes the largest tensors.
        """
        decoder, longest = self.coca.text_decoder, max(length)
        run = partial(checkpoint, use_reentrant=False) if decoder.grad_checkpointing else torch.nn.Module.__call__
        x, attention_mask = text_tokens[:, :longest], decoder.attn_mask[:longest, :longest]
        for block, cross in zip(decoder.resblocks, decoder.cross_attn, strict=True):
            x = run(block, x, None, None, attention_mask)
            x = run(cross, x, image_tokens, image_tokens, None)
        mask = torch.arange(longest) < torch.tensor(list(length))[:, None]  # on the CPU, to avoid a synchronisation
        positions = upload(mask.flatten().nonzero()[:, 0].numpy(), caption.device)
        logits = decoder.ln_final(x).flatten(0, 1)[positions] @ decoder.text_projection
        labels = caption[:, 1 : longest + 1].flatten()[positions]
        return TokenPredictions(logits, labels, positions, (len(length), longest))

    def trainable_counts(self) -> dict[str, int]:
        """Count trainable parameters by tower; ``scales`` are those outside of the towers, such as the logit scale."""
        counts: dict[str, int] = {}
        for tower in TOWERS:
            counts[tower] = sum(p.numel() for p in self.tower(tower).parameters() if p.requires_grad)
        counts["scales"] = sum(p.numel() for p in self.parameters() if p.requires_grad) - sum(counts.values())
        return counts

    def _freeze_unused_parameters(self) -> None:
        """Freeze parameters that the loss does not depend on, which weight decay would shrink.

        These are the projections with contrastive 0, and the decoder with caption 0.
        """
        size = (self.image.height, self.image.width, 3)
        batch = {
            "image": torch.zeros(1, *size, dtype=torch.uint8),
            "caption": torch.zeros(1, self.coca.text.context_length, dtype=torch.int64),
            "length": [1],
        }
        with torch.enable_grad():
            encoded = self(batch)
        outputs = list(encoded.features.values())
        if self.loss.contrastive:
            outputs.append(encoded.scalars["logit_scale"])
        used: set[int] = set()  # ids of the parameters on which the outputs depend
        seen: set[Any] = set()
        pending = [output.grad_fn for output in outputs if output.grad_fn is not None]
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                used.add(id(node.variable))
            pending += [parent for parent, _ in node.next_functions if parent is not None]

        for parameter in self.parameters():
            if id(parameter) not in used:
                parameter.requires_grad_(False)


def check_captioner(config: CaptionerConfig) -> None:
    """Raise UserError if the names of the model and its weights show that it cannot caption. Loads nothing."""
    spec = config.evaluate.generate.captioner(config.captioner.model, config.captioner.weights)
    try:
        check_coca(str(spec.model))
        if not config.captioner.random:
            catalog.check_model(model_name(spec), spec.pretrained)
    except (ValueError, OSError) as error:
        hint = "" if spec.pretrained else "; `captioner.pretrained: random` starts from random ones"
        raise UserError(f"captioner: {error}{hint}") from error


def build_captioner(config: CaptionerConfig) -> CaptionerModel:
    """Build the CoCa of a config with its weights, float32 on the CPU. Raises UserError where it cannot be loaded."""
    check_captioner(config)
    spec = config.evaluate.generate.captioner(config.captioner.model, config.captioner.weights)
    name, wanted = model_name(spec), config.captioner
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            coca: Any = random_model(name) if wanted.random else load_model(spec)
            check_model(spec, coca)
            if wanted.random:  # open_clip leaves it uninitialised, and its `init_parameters` for it is never called
                torch.nn.init.normal_(coca.text_decoder.text_projection, std=coca.text_decoder.width**-0.5)
            model_cfg: Mapping[str, Any] = open_clip.get_model_config(name)
            if wanted.context is not None:
                model_cfg = set_context(coca, model_cfg, wanted.context, wanted.random)
        image = image_spec(open_clip.get_model_preprocess_cfg(coca))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise UserError(f"captioner: {error}") from error
    try:
        check_max_length(spec, coca)
    except ValueError as error:
        raise UserError(f"evaluate.generate.max_length: {error}. Lower it.") from error
    if image.height != image.width:
        raise UserError(
            f"captioner: images of {image.height} x {image.width} are not square, but training crops are: use another "
            "model."
        )
    model = CaptionerModel(name, coca, model_cfg, image, config.loss, wanted.freeze)
    if config.train.compute.gradient_checkpointing:
        coca.set_grad_checkpointing()
    return model


def describe_parameters(model: CaptionerModel) -> str:
    """Return a log line with the trainable parameters and the frozen towers."""
    total = sum(p.numel() for p in model.parameters())
    counts = model.trainable_counts()
    sizes = {name: f"{count / 1e6:,.2f} M" if count >= 10_000 else f"{count:,}" for name, count in counts.items()}
    parts = ", ".join(f"{name} {size}" for name, size in sizes.items() if counts[name])
    frozen = f"; frozen: {', '.join(model.frozen)}" if model.frozen else ""
    return f"{sum(counts.values()) / 1e6:,.2f} of {total / 1e6:,.2f} M parameters are trained ({parts}){frozen}"
