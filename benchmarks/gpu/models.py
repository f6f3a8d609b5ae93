"""Models of a run as folders that a config can name: real weights where they are given, otherwise random ones."""

from __future__ import annotations

import copy
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

from benchmarks.step import TINY
from teachers.open_clip.catalog import DEFAULT_PREPROCESS
from teachers.open_clip.teacher import random_model

_SMALL = {"context_length": 76, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
_TINY: dict[str, Any] = {**TINY, "text_cfg": {**_SMALL, "context_length": 77}}
_VISION: Any = TINY["vision_cfg"]
_TINY_COCA: dict[str, Any] = {
    "embed_dim": _SMALL["width"],
    "vision_cfg": {**_VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "text_cfg": {**_SMALL, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {**_SMALL, "attn_pooler_heads": 2},
    "custom_text": True,
}
_START, _END = 49406, 49407
#: Tokens of a caption between start and end: the shortest, and the mean of the Poisson distribution that is added.
SHORTEST, _FURTHER = 5, 7.0
_FITTED_TEXTS, _FITTED_IMAGES, _LONGEST = 16, 4, 76


def model_folder(name: str, root: Path, weights: Path | None = None, tiny: bool = False) -> str:
    """``local-dir:`` name of a model of open_clip: its folder in ``weights``, if there is one, or one with random
    weights that is written below ``root`` once."""
    if weights is not None and (weights / name).is_dir():
        return f"local-dir:{weights / name}"
    folder = root / ("tiny-" * tiny + name)
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
        _write(unfinished, _config(name, tiny), zlib.crc32(name.encode()))
        unfinished.rename(folder)
    return f"local-dir:{folder}"


def _config(name: str, tiny: bool) -> dict[str, Any]:
    config: Any = copy.deepcopy((_TINY_COCA if "coca" in name else _TINY) if tiny else open_clip.get_model_config(name))
    text = config["text_cfg"]
    if text.pop("hf_tokenizer_name", None):  # the tokenizer would be downloaded; open_clip's own one stands in
        text.pop("tokenizer_kwargs", None)
        text["vocab_size"] = _SMALL["vocab_size"]
    return dict(config)


def _write(folder: Path, config: dict[str, Any], seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {**DEFAULT_PREPROCESS, "size": config["vision_cfg"]["image_size"]}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    (folder / "open_clip_config.json").write_text(text, encoding="utf-8")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = random_model(f"local-dir:{folder}")
        if hasattr(model, "text_decoder"):
            _write_captions_of_natural_length(model)
        state = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(state, folder / "open_clip_model.safetensors")


def _write_captions_of_natural_length(model: Any) -> None:
    """Initialize a CoCa's last projection, which open_clip does not.

    Words are as likely as those of a trained model. The column of the end token is fitted to the hidden states of
    random texts, so that sampled captions have ``SHORTEST`` tokens and a Poisson-distributed number of further ones.
    """
    decoder = model.text_decoder
    width = decoder.text_projection.shape[0]
    torch.nn.init.normal_(decoder.text_projection, std=5 * width**-0.5)
    model.text.positional_embedding.mul_(30)  # so that hidden states depend on the position
    states: list[torch.Tensor] = []
    hook = decoder.ln_final.register_forward_hook(lambda *call: states.append(call[-1].flatten(0, 1)))
    texts = torch.randint(1000, 40000, (_FITTED_TEXTS, _LONGEST))
    texts[:, 0] = _START
    latent, tokens = model._encode_image(torch.randn(_FITTED_IMAGES, 3, *_image_size(model)))
    times = _FITTED_TEXTS // _FITTED_IMAGES
    logits = model(None, texts, latent.repeat(times, 1), tokens.repeat(times, 1, 1), output_labels=False)["logits"]
    hook.remove()
    wanted = logits.flatten(0, 1).logsumexp(-1) + torch.tensor([_log_odds(n) for n in range(_LONGEST)] * _FITTED_TEXTS)
    (hidden,) = states
    ridge = hidden.T @ hidden + 0.01 * len(hidden) * torch.eye(width)
    decoder.text_projection[:, _END] = torch.linalg.solve(ridge, hidden.T @ wanted)


def _image_size(model: Any) -> tuple[int, int]:
    size = model.visual.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def _log_odds(tokens: int) -> float:
    """Log-odds that a caption of so many tokens ends."""
    further = tokens - SHORTEST
    if further < 0:
        return -8.0
    terms = [math.exp(-_FURTHER) * _FURTHER**n / math.factorial(n) for n in range(further, further + 60)]
    share = min(0.99, terms[0] / sum(terms))
    return math.log(share / (1 - share))
