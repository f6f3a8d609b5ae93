"""transformers: a folder with model, image processor and tokenizer that ``from_pretrained`` and ``pipeline`` load."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPImageProcessor

from reinforce.markup import render_markdown
from reinforce.shipping.steps import silenced
from reinforce.shipping.targets.base import ExportOptions, Run, Target
from reinforce.shipping.targets.hugging_face import convert
from reinforce.shipping.tokens import PROBES
from reinforce.shipping.towers import Tower
from teachers.preprocessing.pixels import to_pixels
from teachers.protocols import ImageSpec

FILE = "model.safetensors"
#: Classes of an image tower alone, with the name of what has its embeddings. AutoModel would load another class.
_IMAGE_OUTPUTS = {
    "CLIPVisionModelWithProjection": "image_embeds",
    "TimmWrapperModel": "pooler_output",
    "TimmWrapperForImageClassification": "logits",
}
_CLIP_TEXT = "clip_text_model"  # which ignores what is after the end token
_RESAMPLING = {"bilinear": 2, "bicubic": 3}  # of Pillow


class Transformers(Target):
    title = "transformers"
    weights = ("fp32",)
    template = "export/transformers.md"
    fuses = False

    def __init__(self) -> None:
        self._model: Any = None

    def refuse(self, towers: Sequence[Tower], options: ExportOptions) -> None:
        image, texts = towers[0], next((tower for tower in towers if tower.name == "text"), None)
        spec = _spec(image)
        if not options.config:
            raise ValueError("it is no model of open_clip; of a model of timm, AutoModel loads the folder itself")
        if spec.resize == "crop" and spec.height != spec.width:
            raise ValueError(
                f"it crops images to {spec.height} x {spec.width}, and transformers' CLIPImageProcessor to squares"
            )
        with silenced():
            self._model = convert(image.module.clip, options.config, None if texts is None else texts.example(8))

    def convert(self, tower: Tower, folder: Path, options: ExportOptions) -> Path:
        """Write the model, with both towers in one file, and its image processor."""
        if tower.name == "image":
            with silenced():
                self._model.save_pretrained(folder)
                _processor(_spec(tower)).save_pretrained(folder)
        return folder / FILE

    def load(self, path: Path, threads: int | None = None) -> Run:
        kind = _kind(path.parent)
        with silenced():
            model = getattr(transformers, kind).from_pretrained(path.parent).eval()
        processor = CLIPImageProcessor.from_pretrained(path.parent)
        size = (processor.crop_size["height"], processor.crop_size["width"])
        image = ImageSpec(size, tuple(processor.image_mean), tuple(processor.image_std))
        text = getattr(model.config, "text_config", None)

        def run(rows: torch.Tensor) -> torch.Tensor:
            if rows.dtype == torch.uint8:
                pixels = to_pixels(rows, image)
                if text is None:
                    return normalize(model(pixel_values=pixels)[_IMAGE_OUTPUTS[kind]], dim=-1)
                return normalize(_pooled(model.get_image_features(pixel_values=pixels)), dim=-1)
            assert text is not None
            mask = None if text.model_type == _CLIP_TEXT else (rows != text.pad_token_id).long()
            return normalize(_pooled(model.get_text_features(input_ids=rows, attention_mask=mask)), dim=-1)

        return run

    def complete(self, folder: Path, tokenizer: Any) -> None:
        """Write what AutoTokenizer and AutoProcessor read, and compare the tokens of both tokenizers."""
        if tokenizer is None:
            return
        found = tokenizer.encode("a")
        used = [token for token, used in zip(found.tokens, found.attention_mask, strict=True) if used]
        pads = self._model.config.text_config.model_type != _CLIP_TEXT
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": used[0],
            "eos_token": used[-1],
            "pad_token": tokenizer.padding["pad_token"] if pads else used[-1],
            "model_max_length": len(found.ids),
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,  # those in texts are plain text
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tokenizer.no_padding()
        expected = [tokenizer.encode(text).ids for text in PROBES]
        tokenizer.no_truncation()  # transformers pads and cuts itself, and warns of a tokenizer that does
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        written = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        for text, ids in zip(PROBES, expected, strict=True):
            if written(text, truncation=True).input_ids != ids:
                raise ValueError(f"its tokenizer gives other tokens in transformers for {text[:60]!r}")

    def readme(self, config: Mapping[str, Any], image: ImageSpec) -> str:
        kind = type(self._model).__name__
        return render_markdown(
            self.template, model=config["model"], kind=kind, dim=config["dim"], context=config["context_length"],
            texts=config["context_length"] is not None, bias=config["logit_bias"] is not None,
            output=_IMAGE_OUTPUTS.get(kind),
        )  # fmt: skip


def _spec(tower: Tower) -> ImageSpec:
    spec: Any = tower.module.spec
    assert isinstance(spec, ImageSpec)
    return spec


def _kind(folder: Path) -> str:
    (kind,) = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    return str(kind)


def _pooled(features: Any) -> torch.Tensor:
    """The features of an image or text: transformers 5 returns more beside them."""
    found: torch.Tensor = features if isinstance(features, torch.Tensor) else features.pooler_output
    return found


def _processor(image: ImageSpec) -> CLIPImageProcessor:
    size = {"height": image.height, "width": image.width}
    crop = image.resize == "crop"
    return CLIPImageProcessor(
        size={"shortest_edge": image.height} if crop else size,
        resample=_RESAMPLING[image.interpolation],
        do_center_crop=crop,
        crop_size=size,
        image_mean=list(image.mean),
        image_std=list(image.std),
    )


TARGET = Transformers()
