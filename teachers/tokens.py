"""Texts before they are encoded, and the files of a tokenizer.

Special tokens in texts are escaped: caption text such as ``<end_of_text>`` must not become the token itself. Batches
are padded to their longest text; that embeddings are equal for texts padded to it or to full length is checked.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

#: Texts of several lengths, the last longer than any context.
PROBE_TEXTS = ("", "cat", "a photo of a cat", "two dogs, one of them brown, run over a wet meadow at dawn; " * 12)
_TOLERANCE = 1e-4  # on unit-norm float32; storage in float16 loses five times that


def special_token_escaper(tokens: Iterable[str]) -> Callable[[str], str]:
    """Return a function that breaks every spelling of the tokens, in any case, by a space after its first character.

    ``<end_of_text>`` becomes ``< end_of_text>``, which is tokenized as plain characters. Other text is unchanged.
    """
    spellings = sorted({token for token in tokens if len(token) > 1}, key=len, reverse=True)
    if not spellings:
        return lambda text: text
    pattern = re.compile("|".join(re.escape(token) for token in spellings), re.IGNORECASE)

    def escape(text: str) -> str:
        # Breaking one token can leave an overlapping one intact, so repeat until nothing matches.
        while (broken := pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)) != text:
            text = broken
        return text

    return escape


def trimming_is_exact(encode: Callable[[Sequence[str], bool], torch.Tensor]) -> bool:
    """Compare ``encode(texts, trim) -> [B, dim]`` with and without trimming, on batches of growing longest text."""
    import torch

    for count in range(1, len(PROBE_TEXTS) + 1):
        texts = PROBE_TEXTS[:count]
        with torch.inference_mode():  # without autocast, so in float32 whatever the teacher's precision
            full, trimmed = (
                torch.nn.functional.normalize(encode(texts, trim).float(), dim=-1) for trim in (False, True)
            )
        if not torch.allclose(full, trimmed, rtol=0, atol=_TOLERANCE):
            _log.warning("texts are encoded at full length: trimmed ones differ by %g", (full - trimmed).abs().max())
            return False
    return True


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
    for file, key in (("tokenizer_config.json", "tokenizer_class"), ("config.json", "model_type")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kind = str(json.loads((folder / file).read_text(encoding="utf-8"))[key])
            if kind.lower().startswith(_WITHOUT_VOCABULARY):
                return
    raise FileNotFoundError(
        f"folder {folder} has no tokenizer files, so all its texts would get the same tokens: expected one of "
        f"{', '.join(_NAMES)}. Save the model's tokenizer or processor into the folder as well: "
        f"AutoTokenizer.from_pretrained(ORIGINAL_MODEL).save_pretrained({str(folder)!r})"
    )
