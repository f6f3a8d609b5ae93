"""The demo's models before and after they learn: architectures and a tokenizer of their own, and what is committed.

open_clip's vocabulary of 49,408 would be most of a model this small, so they share one of VOCABULARY tokens, in which
every text can still be written, for it falls back to bytes.
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

#: Folder name -> open_clip config. Shapes, sizes and dimensions differ, as those of real teachers do.
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


def write_blanks(out: str | Path, lessons: str | Path, seed: int = 0) -> list[Path]:
    """Write each of MODELS as ``out/NAME``, as its training starts: with a tokenizer learnt from shards' captions.

    CLIPs have no weights, which a training draws from its own seed; the CoCa has random ones, since a fine-tuning
    starts from weights. Equal bytes for equal arguments. Raises UserError.
    """
    from safetensors.torch import save_file

    tokenizer = train_tokenizer(captions_of(lessons))
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


def captions_of(shards: str | Path) -> Iterator[str]:
    """The captions of all shards in a folder of folders. Raises UserError where there is none."""
    paths = sorted(Path(shards).glob("*/*.tar"))
    if not paths:
        raise UserError(f"{shards} has no shards. Run `python -m reinforce.demo lessons` first.")
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".txt") and (file := tar.extractfile(member)) is not None:
                    yield file.read().decode()


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of lower-case text in VOCABULARY tokens, the end's the highest, by which CLIP finds it."""
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
        raise UserError(f"the captions give {tokenizer.get_vocab_size():,} tokens, and {start:,} are wanted.")
    tokenizer.add_special_tokens([first, last])
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{first} $0 {last}", special_tokens=[(first, start), (last, end)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=first, eos_token=last, pad_token=pad)


def keep(trained: str | Path, folder: str | Path) -> int:
    """Copy an exported open_clip model in float16, for a repository; returns its bytes. Raises UserError."""
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
    import open_clip
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        # open_clip allocates the decoder's head without filling it
        projection = model.text_decoder.text_projection
        torch.nn.init.normal_(projection, std=projection.shape[0] ** -0.5)
    return {name: value.contiguous() for name, value in model.state_dict().items()}
