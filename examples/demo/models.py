"""The demo's models: architectures and tokenizer before training, and the copy that is committed after it.

open_clip's vocabulary of 49,408 tokens would be most of the weights of such small models. They share a vocabulary of
VOCABULARY tokens instead, a byte-level BPE that can encode every text.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinforce.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 3072
_TEXT = {
    "context_length": 24,
    "vocab_size": VOCABULARY,
    "width": 96,
    "heads": 3,
    "layers": 2,
    "hf_tokenizer_name": "of this folder",
}
_OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"

#: Folder name -> open_clip config. Architectures, sizes and dimensions differ, like those of real teachers.
MODELS: dict[str, dict[str, Any]] = {
    "conv-64": {
        "model_cfg": {
            "embed_dim": 128,
            "vision_cfg": {"image_size": 64, "patch_size": None, "width": 16, "layers": [1, 1, 2, 2]},
            "text_cfg": _TEXT,
        },
        "preprocess_cfg": {"size": 64, **_OPENAI, "interpolation": "bicubic", "resize_mode": "shortest"},
    },
    "conv-48": {
        "model_cfg": {
            "embed_dim": 96,
            "vision_cfg": {"image_size": 48, "patch_size": None, "width": 16, "layers": [1, 1, 1, 1]},
            "text_cfg": _TEXT,
        },
        "preprocess_cfg": {"size": 48, **_HALF, "interpolation": "bicubic", "resize_mode": "squash"},
    },
    "coca-64": {
        "model_cfg": {
            "embed_dim": 80,
            "vision_cfg": {
                "image_size": 64,
                "patch_size": 8,
                "width": 80,
                "layers": 3,
                "head_width": 20,
                "attentional_pool": True,
                "attn_pooler_heads": 4,
                "attn_pooler_queries": 32,
                "output_tokens": True,
            },
            "text_cfg": {
                **{**_TEXT, "context_length": 23, "width": 80, "heads": 4, "layers": 1},
                **{"embed_cls": True, "output_tokens": True},
            },
            "multimodal_cfg": {
                "vocab_size": VOCABULARY,
                "context_length": 23,
                "width": 80,
                "heads": 4,
                "layers": 2,
                "attn_pooler_heads": 4,
            },
            "custom_text": True,
        },
        "preprocess_cfg": {"size": 64, **_OPENAI, "interpolation": "bicubic", "resize_mode": "shortest"},
    },
}
MODELS["styles-64"] = MODELS["conv-64"]  # trained on more styles


def write_initial_models(out: str | Path, data: str | Path, seed: int = 0) -> list[Path]:
    """Write each of MODELS before training to ``out/NAME``, with a tokenizer trained on the captions of ``data``.

    The CLIPs have no weights, since training initializes them from its own seed; the CoCa has random weights, since
    fine-tuning needs some. Equal arguments give equal bytes. Raises UserError.
    """
    from safetensors.torch import save_file

    tokenizer = train_tokenizer(read_captions(data))
    folders = []
    for name, config in MODELS.items():
        folder = Path(out) / name
        folders.append(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            tokenizer.save_pretrained(folder)
            if "multimodal_cfg" in config["model_cfg"]:
                save_file(_random_weights(folder, seed), folder / WEIGHTS)
        except OSError as error:
            raise UserError(f"cannot write the demo's models to {folder}: {error}. Give another --out.") from error
    return folders


def read_captions(folder: str | Path) -> Iterator[str]:
    """Yield the captions of all shards in the subfolders of a folder. Raises UserError if there is no shard."""
    paths = sorted(Path(folder).glob("*/*.tar"))
    if not paths:
        raise UserError(f"{folder} has no shards. Run `python -m examples.demo teacher-data` first.")
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".txt") and (file := tar.extractfile(member)) is not None:
                    yield file.read().decode()


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-pair encoding of lower-case text with VOCABULARY tokens.

    The end token has the highest id, by which CLIP finds it. Raises UserError if the texts give too few tokens.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    start, end = VOCABULARY - 2, VOCABULARY - 1
    pad, first, last = "<pad>", "<start_of_text>", "<end_of_text>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=start,
            special_tokens=[pad],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    if tokenizer.get_vocab_size() != start:
        raise UserError(
            f"the captions give only {tokenizer.get_vocab_size():,} of {start:,} tokens: use more captions."
        )
    tokenizer.add_special_tokens([first, last])
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{first} $0 {last}", special_tokens=[(first, start), (last, end)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=first, eos_token=last, pad_token=pad)


def keep_model(trained: str | Path, folder: str | Path) -> int:
    """Copy an exported open_clip model in float16; return the size of its weights in bytes. Raises UserError."""
    from safetensors.torch import load_file, save

    source, target = Path(trained), Path(folder)
    if not (source / WEIGHTS).exists():
        raise UserError(f"{source} has no {WEIGHTS}: finish its training first.")
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.name != WEIGHTS:
            shutil.copyfile(path, target / path.name)
    state = load_file(source / WEIGHTS)
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    return (target / WEIGHTS).write_bytes(save(half))


def _random_weights(folder: Path, seed: int) -> dict[str, Any]:
    """Return seeded random weights of a CoCa, with every parameter initialized."""
    import open_clip
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        # open_clip leaves the decoder's head uninitialized
        projection = model.text_decoder.text_projection
        torch.nn.init.normal_(projection, std=projection.shape[0] ** -0.5)
    return {name: value.contiguous() for name, value in model.state_dict().items()}
