"""A CoCa while it learns: what its forward pass gives to the loss, and which of its weights move."""

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
from teachers import open_clip_catalog as catalog
from teachers.coca import check_model, check_model_name
from teachers.open_clip import image_spec, load_model, model_name
from teachers.pixels import to_pixels
from teachers.protocols import ImageSpec
from teachers.spec import CaptionerSpec

#: Modules of a CoCa by the names that configs use.
_MODULES: Mapping[Tower, str] = {"image": "visual", "text": "text", "decoder": "text_decoder"}


@dataclass(frozen=True)
class Predicted:
    """Logits [n, vocabulary] of the n predicted tokens of a batch, which are ``labels`` int64 [n].

    ``places`` [n] are their positions in captions of ``shape`` (b, longest) laid end to end.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    places: torch.Tensor
    shape: tuple[int, int]

    def nll(self) -> torch.Tensor:
        """-log P of each token, float32 [n]."""
        return cross_entropy(self.logits.float(), self.labels, reduction="none")

    def nll_of_captions(self) -> torch.Tensor:
        """-log P of each caption, float32 [b]."""
        nll = self.nll()
        # each place is written once: on CUDA a sum by owner would depend on the order of threads
        return nll.new_zeros(self.shape).flatten().index_copy(0, self.places, nll).view(self.shape).sum(dim=1)

    def hits(self) -> torch.Tensor:
        """Whether the true token is the likeliest, bool [n]."""
        return self.logits.argmax(dim=-1) == self.labels


class CaptionerModel(torch.nn.Module):
    """An open_clip CoCa in training.

    ``coca`` is the model itself, ``config`` its ``model_cfg``, ``name`` what open_clip knows both by. Parameters of
    frozen towers, and those that the loss does not depend on, do not learn; frozen towers stay in eval mode.
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
        self._freeze_what_the_loss_does_not_reach()

    def tower(self, tower: Tower) -> torch.nn.Module:
        module: torch.nn.Module = getattr(self.coca, _MODULES[tower])
        return module

    def train(self, mode: bool = True) -> CaptionerModel:
        super().train(mode)
        for tower in self.frozen:
            self.tower(tower).eval()
        return self

    def forward(self, batch: Batch) -> Encoded:
        """Features of the losses whose weight is not 0, for the b samples of a batch (see ``captioning.feed``).

        ``image`` and ``text`` float32 [b, D], unit norm; ``nll`` float32 [b], the sum over a caption's tokens of
        -log P(token | the image, the tokens before).
        """
        images, image_tokens = self.coca._encode_image(to_pixels(batch["image"], self.image), normalize=False)
        texts, text_tokens = self.coca._encode_text(batch["caption"], normalize=False)
        features = {}
        if self.loss.contrastive:
            features = {"image": normalize(images.float(), dim=-1), "text": normalize(texts.float(), dim=-1)}
        if self.loss.caption:
            predicted = self.predict(image_tokens, text_tokens, batch["caption"], batch["length"])
            features["nll"] = predicted.nll_of_captions()
        return Encoded(features, scalars={"logit_scale": self.coca.logit_scale.exp().reshape(())})

    def predict(
        self, image_tokens: torch.Tensor, text_tokens: torch.Tensor, caption: torch.Tensor, length: Sequence[int]
    ) -> Predicted:
        """What the decoder makes of captions int64 [b, context] of which ``length`` [b] tokens are predicted.

        As in open_clip's forward, position i of the decoder, which sees the tokens up to i, predicts token i + 1.
        Nothing behind the longest caption is computed, and the projection to the vocabulary, which makes the largest
        tensors of all, is spared the padding.
        """
        decoder, longest = self.coca.text_decoder, max(length)
        run = partial(checkpoint, use_reentrant=False) if decoder.grad_checkpointing else _call
        x, mask = text_tokens[:, :longest], decoder.attn_mask[:longest, :longest]
        for block, cross in zip(decoder.resblocks, decoder.cross_attn, strict=True):
            x = run(block, x, None, None, mask)
            x = run(cross, x, image_tokens, image_tokens, None)
        counted = torch.arange(longest) < torch.tensor(list(length))[:, None]  # on the CPU: no waiting for the device
        places = counted.flatten().nonzero()[:, 0].to(caption.device, non_blocking=True)
        logits = decoder.ln_final(x).flatten(0, 1)[places] @ decoder.text_projection
        labels = caption[:, 1 : longest + 1].flatten()[places]
        return Predicted(logits, labels, places, (len(length), longest))

    def learnt(self) -> dict[str, int]:
        """Parameters that learn, by tower; ``scales`` are the logit scale and what else lies outside of the towers."""
        counts: dict[str, int] = {}
        for tower in TOWERS:
            counts[tower] = sum(p.numel() for p in self.tower(tower).parameters() if p.requires_grad)
        counts["scales"] = sum(p.numel() for p in self.parameters() if p.requires_grad) - sum(counts.values())
        return counts

    def _freeze_what_the_loss_does_not_reach(self) -> None:
        """Weight decay would shrink it: with contrastive 0 the projections, with caption 0 the whole decoder."""
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
        reached = _leaves(outputs)
        for parameter in self.parameters():
            if id(parameter) not in reached:
                parameter.requires_grad_(False)


def check_captioner(config: CaptionerConfig) -> None:
    """Raise UserError where the names of the model and its weights tell that it cannot caption. Loads nothing."""
    spec = _spec(config)
    try:
        check_model_name(str(spec.model))
        catalog.check_model(model_name(spec), spec.pretrained)
    except (ValueError, OSError) as error:
        raise UserError(f"captioner: {error}") from error


def build_captioner(config: CaptionerConfig) -> CaptionerModel:
    """The CoCa of a config with its weights, float32 on the CPU. Raises UserError where it cannot be."""
    check_captioner(config)
    spec = _spec(config)
    try:
        coca: Any = load_model(spec)
        check_model(spec, coca)
        image = image_spec(open_clip.get_model_preprocess_cfg(coca))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise UserError(f"captioner: {error}") from error
    if image.height != image.width:
        raise UserError(f"captioner: images of {image.height} x {image.width} are not square, as training crops are.")
    name = model_name(spec)
    model = CaptionerModel(name, coca, open_clip.get_model_config(name), image, config.loss, config.captioner.freeze)
    if config.train.compute.gradient_checkpointing:
        coca.set_grad_checkpointing()
    return model


def _spec(config: CaptionerConfig) -> CaptionerSpec:
    return config.evaluate.generate.captioner(config.captioner.model, config.captioner.pretrained)


def describe(model: CaptionerModel) -> str:
    """What learns and what does not, for the log."""
    total = sum(p.numel() for p in model.parameters())
    learnt = model.learnt()
    sizes = {name: f"{count / 1e6:,.2f} M" if count >= 10_000 else f"{count:,}" for name, count in learnt.items()}
    parts = ", ".join(f"{name} {size}" for name, size in sizes.items() if learnt[name])
    frozen = f"; frozen: {', '.join(model.frozen)}" if model.frozen else ""
    return f"{sum(learnt.values()) / 1e6:,.2f} of {total / 1e6:,.2f} M parameters learn ({parts}){frozen}"


def _call(module: torch.nn.Module, *arguments: Any) -> torch.Tensor:
    result: torch.Tensor = module(*arguments)
    return result


def _leaves(outputs: Sequence[torch.Tensor]) -> set[int]:
    """Ids of the parameters that outputs depend on."""
    found: set[int] = set()
    seen: set[Any] = set()
    todo = [output.grad_fn for output in outputs if output.grad_fn is not None]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo += [following for following, _ in node.next_functions if following is not None]
    return found
