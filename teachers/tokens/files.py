"""Check that a local model folder has the files of its Hugging Face tokenizer. Imports neither torch nor transformers.

Without them transformers 5 builds a tokenizer of a few special tokens, and every text gets the same embedding.
"""

from __future__ import annotations

import json
from pathlib import Path

#: Names of files that hold a vocabulary, and their suffixes for SentencePiece and tiktoken.
_NAMES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_SUFFIXES = (".model", ".spm", ".tiktoken")
#: Tokenizers of bytes or characters, which need no vocabulary: ByT5, CANINE, Perceiver.
_WITHOUT_VOCABULARY = ("byt5", "canine", "perceiver")


def check_tokenizer_files(folder: Path) -> None:
    """Raise FileNotFoundError if a folder has no vocabulary of a tokenizer."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    if any(name in _NAMES or name.startswith("vocab.") or name.endswith(_SUFFIXES) for name in names):
        return
    if _needs_no_vocabulary(folder):
        return
    raise FileNotFoundError(
        f"folder {folder} has no tokenizer files, so all its texts would get the same tokens: expected one of "
        f"{', '.join(_NAMES)}. Save the model's tokenizer or processor into the folder as well: "
        f"AutoTokenizer.from_pretrained(ORIGINAL_MODEL).save_pretrained({str(folder)!r})"
    )


def _needs_no_vocabulary(folder: Path) -> bool:
    kinds = []
    for file, key in (("tokenizer_config.json", "tokenizer_class"), ("config.json", "model_type")):
        try:
            kinds.append(str(json.loads((folder / file).read_text(encoding="utf-8"))[key]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return any(kind.lower().startswith(_WITHOUT_VOCABULARY) for kind in kinds)
