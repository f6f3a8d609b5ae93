"""Captions by CoCa: images encoded once, N captions of each decoded side by side by seeded nucleus sampling."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import torch

from teachers import open_clip_catalog as catalog
from teachers.device import Accelerator
from teachers.open_clip import image_spec, load_model, model_name
from teachers.sampling import sample_nucleus, uniforms
from teachers.spec import CaptionerSpec

#: Captions decoded side by side; bounds the memory of a step whatever the batch.
_ROWS = 1024


class CocaCaptioner:
    """Any CoCa of open_clip as a captioner.

    Raises ValueError or FileNotFoundError for what the spec has wrong, a model that cannot caption included.
    """

    def __init__(self, spec: CaptionerSpec, accelerator: Accelerator) -> None:
        assert spec.model is not None
        _refuse_other_models(spec.model)
        model: Any = load_model(spec)
        _refuse_models_that_cannot_caption(spec, model)
        self.image = image_spec(open_clip.get_model_preprocess_cfg(model))
        self.captions = spec.captions
        self._spec = spec
        self._accelerator = accelerator
        self._model = accelerator.prepare(model)
        self._tokens = Vocabulary(open_clip.get_tokenizer(model_name(spec)))
        size = model.text_decoder.text_projection.shape[1]
        self._impossible = self._tokens.impossible(size).to(accelerator.device)

    @torch.inference_mode()
    def caption(self, pixels: torch.Tensor, seeds: npt.NDArray[np.uint64]) -> list[list[str]]:
        """[B, 3, H, W] float32 and seeds [B, captions] -> captions of each image.

        Caption (b, n) is a function of image b and seeds[b, n], up to the rounding of matrix products, which
        may differ with the batch. Raises ValueError where the model's logits are NaN.
        """
        if seeds.shape != (len(pixels), self.captions):
            raise ValueError(f"want seeds of shape {(len(pixels), self.captions)}, got {seeds.shape}")
        with self._accelerator.forward():
            _, embeddings = self._model._encode_image(self._accelerator.layout(pixels))
        images = max(1, _ROWS // self.captions)
        texts: list[str] = []
        for i in range(0, len(pixels), images):
            rows = embeddings[i : i + images].repeat_interleave(self.captions, dim=0)
            texts += [self._tokens.text(ids) for ids in self._decode(rows, seeds[i : i + images].reshape(-1))]
        return [texts[i : i + self.captions] for i in range(0, len(texts), self.captions)]

    def _decode(self, embeddings: torch.Tensor, seeds: npt.NDArray[np.uint64]) -> list[list[int]]:
        """Image embeddings [rows, L, D] and seeds [rows] -> the tokens between start and end of each row."""
        steps = self._spec.max_length - 2  # start and end count
        u = torch.from_numpy(uniforms(seeds, steps)).to(embeddings.device)
        forward = FullForward(self._model, embeddings)
        tokens = torch.full((len(seeds), 1), self._tokens.start, device=embeddings.device)
        running = np.arange(len(seeds))
        finished: dict[int, list[int]] = {}
        for step in range(steps):
            with self._accelerator.forward():
                logits = forward.next_logits(tokens)
            logits = logits.float().masked_fill(self._impossible, -torch.inf)
            if step < self._spec.min_length:
                logits[:, self._tokens.end] = -torch.inf
            sampled = sample_nucleus(logits, u[:, step], self._spec.temperature, self._spec.top_p)
            going = sampled != self._tokens.end
            kept = going.cpu().numpy()
            if not kept.all():
                finished.update(zip(running[~kept].tolist(), tokens[~going, 1:].tolist(), strict=True))
                running, tokens, sampled, u = running[kept], tokens[going], sampled[going], u[going]
                forward.keep(going)
            tokens = torch.cat([tokens, sampled[:, None]], dim=1)
            if not len(running):
                break
        finished.update(zip(running.tolist(), tokens[:, 1:].tolist(), strict=True))
        return [finished[row] for row in range(len(seeds))]


class FullForward:
    """Next-token logits of rows that grow together, by CoCa's forward pass over all tokens at each step.

    Only the last position goes through the vocabulary's projection, which makes the largest tensor by far.
    """

    def __init__(self, model: Any, image_embeddings: torch.Tensor) -> None:
        self._model = model
        self._image_embeddings = image_embeddings

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens so far, int64 [rows, length] -> [rows, vocabulary]. Call inside ``Accelerator.forward``."""
        _, x = self._model._encode_text(tokens)
        decoder, images = self._model.text_decoder, self._image_embeddings
        mask = decoder.attn_mask[: x.shape[1], : x.shape[1]]
        for block, cross in zip(decoder.resblocks, decoder.cross_attn, strict=True):
            x = cross(block(x, attn_mask=mask), k_x=images, v_x=images)
        logits: torch.Tensor = decoder.ln_final(x[:, -1]) @ decoder.text_projection
        return logits

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone: bool [rows]."""
        self._image_embeddings = self._image_embeddings[rows]


class Vocabulary:
    """What decoding needs of an open_clip tokenizer, its own or one of Hugging Face's in its wrapper.

    ``start`` and ``end`` are the tokens it puts around a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.start, self.end = tokenizer("")[0, :2].tolist()
        self._hugging_face = hasattr(tokenizer, "tokenizer")
        self._tokenizer = tokenizer.tokenizer if self._hugging_face else tokenizer
        self._size = len(self._tokenizer) if self._hugging_face else tokenizer.vocab_size

    def impossible(self, size: int) -> torch.Tensor:
        """bool [size]: outputs of the model that are no word, the special tokens but the end and what is unused."""
        mask = torch.arange(size) >= self._size
        mask[[token for token in self._tokenizer.all_special_ids if token < size]] = True
        mask[self.start] = True
        mask[self.end] = False
        return mask

    def text(self, tokens: list[int]) -> str:
        """Tokens between start and end -> text."""
        text: str = self._tokenizer.decode(tokens)
        return text.strip()


def _refuse_other_models(name: str) -> None:
    """Before any weights are fetched, where the name is enough to tell."""
    config = catalog.model_config(name)
    if config is not None and "multimodal_cfg" not in config:
        known = ", ".join(model for model in catalog.builtin_models() if model.startswith("coca_"))
        raise ValueError(f"captioner model {name!r} is not a CoCa and cannot caption: use one of {known}")


def _refuse_models_that_cannot_caption(spec: CaptionerSpec, model: Any) -> None:
    if not isinstance(model, open_clip.CoCa):
        raise ValueError(f"captioner model {spec.model!r} is a {type(model).__name__}, not a CoCa, and cannot caption")
    if getattr(model.text, "attn_mask", None) is None:
        raise ValueError(
            f"captioner model {spec.model!r} cannot caption: its text tower is not causal, so the words so far "
            "would have to see the words to come"
        )
    context = min(model.text.context_length, model.text_decoder.context_length)
    if spec.max_length > context:
        raise ValueError(
            f"max_length {spec.max_length} of captioner model {spec.model!r} exceeds its context of {context}"
        )
