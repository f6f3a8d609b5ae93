"""Convert an open_clip model's tokenizer to a ``tokenizer.json`` of the package ``tokenizers``.

open_clip cleans text in Python before tokenizing. Here the cleaning is expressed as normalizers: ftfy's tables (quotes,
ligatures, widths, control characters), HTML entities, white space and case. Three things cannot be expressed as tables
and are left out: repair of text that was decoded with the wrong encoding, rare entities outside HTML 4, and ftfy's rule
to keep entities in texts with a <, which open_clip unescapes later as HTML.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html.entities import html5, name2codepoint
from typing import Any

import open_clip
from ftfy.chardata import CONTROL_CHARS, HTML_ENTITIES, LIGATURES, WIDTH_MAP
from open_clip.tokenizer import HFTokenizer, get_clean_fn
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from teachers.open_clip.text import Tokenizer as Reference
from teachers.open_clip.text import tokenizer_of

#: Texts whose tokens are compared with open_clip's before a tokenizer is exported.
PROBES = (
    "a photo of a cat",
    "A Dog, running   through the snow!\n",
    "",
    "it's the artist's 2nd work; they'll say I'd've won't",
    "1,234.5 km² at 45° — costs $9.99/€8 (20% off)…",
    "“Curly” quotes, an author’s ‘word’ and ﬁne ﬂags",
    "Caf&eacute; &amp; Bar &quot;Zum L&ouml;wen&quot; &#39;99 &nbsp; &lt;3 &amp;amp;",
    "Ünïcödé naïve façade Œuvre Straße ΟΔΥΣΣΕΥΣ İstanbul",
    "Кошка спит на окне. 猫が窓で寝ている。 고양이 گربه बिल्ली",
    "ＦＵＬＬ　ｗｉｄｔｈ １２３ ｶﾀｶﾅ",
    "cafe\u0301 by the A\u030angstro\u0308m line\u200b\ufeff",
    "family 👨‍👩‍👧‍👦 flag 🇨🇭 heart ❤️ thumbs 👍🏽",
    "https://example.org/shop?item=cup&currency=EUR&copy=2&amp=3 &#39tis &copy2026 AT&ampT",
    "snake_case file-name.jpg https://example.org/a?b=c&d=e user@example.org #tag @you",
    "<start_of_text> <END_OF_TEXT> <mask> </s> [SEP]",
    "<end_of_text>",
    "&lt;end_of_text&gt; <<end_of_text>> <|endoftext|>",
    "tab\tand\r\nlines\u2028and\u00a0spaces\u3000of\x1call\x85kinds",
    "the quick brown fox jumps over the lazy dog " * 12,
    "antidisestablishmentarianism" * 12,
)

#: Texts that are compared as they look when their UTF-8 is read as Latin-1, which open_clip repairs by ftfy.
MISREAD = (
    "schön", "Café au lait", "“quoted” – l’humanité", "Кошка спит", "猫が窓で寝ている", "45° ±2 km² €8", "❤ and ½",
)  # fmt: skip
#: The white space of Python's ``str.split``.
_SPACES = "[\t-\r\x1c- \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+"
_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^`{|}~]"""  # string.punctuation without _
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
#: C1 control characters -> the Windows-1252 characters that were meant.
_C1 = {code: bytes([code]).decode("cp1252", "ignore") or chr(code) for code in range(0x80, 0xA0)}
#: Characters that are often written as numeric entities.
_NUMERIC_ENTITIES = (*map(ord, string.punctuation), 160, 8211, 8212, 8216, 8217, 8220, 8221, 8226, 8230)


@dataclass(frozen=True)
class Misread:
    """What a tokenizer.json makes of text in a wrong encoding, and what the student, which repairs it.

    ``different`` of ``texts`` texts have other tokens; ``example`` has ``tokens``, of the student and of the file.
    """

    texts: int
    different: int
    example: str
    tokens: tuple[int, int]

    def line(self) -> str:
        repaired, found = self.tokens
        return (
            f"tokenizer.json: other tokens for {self.different} of {self.texts} texts in a wrong encoding, which ftfy "
            f"repairs for the student and no tokenizer.json can: {found} for {repaired} in {self.example}"
        )


def misread_texts(tokenizer: Tokenizer, model: str) -> Misread | None:
    """Compare the tokens of ``MISREAD`` texts with those of the student; None if all are equal."""
    texts = [text.encode().decode("latin-1") for text in MISREAD]
    expected, found = Reference(model)(texts).tolist(), [text.ids for text in tokenizer.encode_batch(texts)]
    pairs = [(text, *pair) for text, *pair in zip(texts, expected, found, strict=True) if pair[0] != pair[1]]
    if not pairs:
        return None
    assert tokenizer.padding is not None  # of convert_tokenizer
    padding = tokenizer.padding["pad_id"]
    text, *rows = pairs[0]
    repaired, own = (len(row) - sum(one == padding for one in row) for row in rows)
    return Misread(len(texts), len(pairs), text, (repaired, own))


def convert_tokenizer(model: str) -> Tokenizer:
    """Return the tokenizer of an open_clip model, which pads and truncates to its context length.

    Special tokens in texts are plain text, as for students. Raises ValueError if the package ``tokenizers`` cannot
    reproduce its tokens.
    """
    original = tokenizer_of(model)
    if isinstance(original, open_clip.SimpleTokenizer):
        tokenizer = _convert_clip(original)
    elif isinstance(original, HFTokenizer):
        tokenizer = _convert_hugging_face(original)
    else:
        raise ValueError(f"its tokenizer, a {type(original).__name__}, cannot be converted to tokenizer.json")
    reference = Reference(model)
    own = (token for token in _special_of(original) if len(token) > 1)
    for text in (*PROBES, *(f"a photo{token}of a cat" for token in own)):
        if tokenizer.encode(text).ids != reference([text])[0].tolist():
            raise ValueError(f"its tokenizer cannot be expressed as tokenizer.json: other tokens for {text[:60]!r}")
    return tokenizer


def _convert_clip(original: open_clip.SimpleTokenizer) -> Tokenizer:
    bpe = models.BPE(vocab=original.encoder, merges=list(original.bpe_ranks), end_of_word_suffix="</w>")
    tokenizer = Tokenizer(bpe)
    special = _special_of(original)
    start, end = special[:2]
    tokenizer.normalizer = normalizers.Sequence([*_cleaning(_clean_name(original)), *_split_special(special)])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, original.sot_token_id), (end, original.eot_token_id)]
    )
    tokenizer.enable_truncation(original.context_length)
    tokenizer.enable_padding(length=original.context_length, pad_id=0, pad_token=original.decoder[0])
    return tokenizer


def _convert_hugging_face(original: HFTokenizer) -> Tokenizer:
    fast = original.tokenizer
    if not getattr(fast, "is_fast", False):
        raise ValueError(f"its tokenizer, a {type(fast).__name__}, cannot be converted to tokenizer.json")
    saved = json.loads(fast.backend_tokenizer.to_str())
    # Special tokens inside texts count as plain text; the post_processor holds the ids of those around texts.
    saved["added_tokens"] = [token for token in saved["added_tokens"] if not token["special"]]
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    own = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
    special = _special_of(original)
    tokenizer.normalizer = normalizers.Sequence([*_cleaning(_clean_name(original)), *_split_special(special), *own])
    tokenizer.enable_truncation(original.context_length)
    tokenizer.enable_padding(
        direction=fast.padding_side,
        length=original.context_length,
        pad_id=fast.pad_token_id,
        pad_type_id=fast.pad_token_type_id,
        pad_token=fast.pad_token,
    )
    return tokenizer


def _special_of(original: Any) -> list[str]:
    """The special tokens of a tokenizer of open_clip."""
    if isinstance(original, open_clip.SimpleTokenizer):
        return [original.decoder[index] for index in original.all_special_ids]
    return list(original.tokenizer.all_special_tokens)


def _clean_name(original: Any) -> str:
    """Return which of open_clip's three cleaning functions a tokenizer uses. Raises ValueError."""
    for name in ("lower", "whitespace", "canonicalize"):
        if original.clean_fn is get_clean_fn(name):
            return name
    raise ValueError("its tokenizer uses a custom cleaning function")


def _cleaning(name: str) -> Iterator[normalizers.Normalizer]:
    """Yield the normalizers equivalent to open_clip's ``get_clean_fn(name)``."""
    yield normalizers.Replace("&amp;", "&")
    # Numeric entities and the oldest names need no semicolon, as in HTML.
    known = {entity.lower() for entity in name2codepoint}
    for entity, text in HTML_ENTITIES.items():
        if entity[1:-1].lower() in known or text in string.punctuation:
            yield normalizers.Replace(Regex(entity), text)
    for code in _NUMERIC_ENTITIES:
        yield normalizers.Replace(Regex(f"&#0?{code}(?:;|(?![0-9]))"), chr(code))
        yield normalizers.Replace(Regex(f"(?i)&#x0?{code:x}(?:;|(?![0-9a-f]))"), chr(code))
    old = [entity for entity in html5 if not entity.endswith(";")]
    for entity in sorted(old, key=lambda entity: (entity != "amp", -len(entity))):
        yield normalizers.Replace(Regex(f"&{entity};?"), html5[entity])
    yield normalizers.Replace(Regex("\x1b\\[[0-9;]*[a-zA-Z]"), "")
    yield from _table(_C1)
    yield from _table(LIGATURES)
    yield from _table(WIDTH_MAP)
    yield normalizers.Replace(Regex("[\u02bc\u2018-\u201b]"), "'")
    yield normalizers.Replace(Regex("[\u201c-\u201f]"), '"')
    yield normalizers.Replace(Regex(f"[{''.join(map(chr, CONTROL_CHARS))}]"), "")
    yield normalizers.NFC()
    if name == "canonicalize":
        yield normalizers.Replace("_", " ")
        yield normalizers.Replace(Regex(_PUNCTUATION), "")
    if name in ("lower", "canonicalize"):
        yield normalizers.Replace(Regex(r"(?<=\p{L})Σ(?!\p{L})"), "ς")  # final sigma, as in Python's str.lower
        yield normalizers.Lowercase()
    yield normalizers.Replace(Regex(_SPACES), " ")
    yield normalizers.Strip()


def _table(table: Mapping[int, str | int | None]) -> Iterator[normalizers.Normalizer]:
    """Yield the normalizers equivalent to ``str.translate``."""
    for code, new in table.items():
        yield normalizers.Replace(chr(code), chr(new) if isinstance(new, int) else new or "")


def _split_special(special: list[str]) -> Iterator[normalizers.Normalizer]:
    """Insert a space after the first character of a special token in a text, so that it is tokenized as plain text."""
    for token in sorted({token for token in special if len(token) > 1}, key=len, reverse=True):
        head, tail = _escape(token[0]), "".join(map(_escape, token[1:]))
        yield normalizers.Replace(Regex(f"(?i){head}(?={tail})"), f"{token[0]} ")


def _escape(character: str) -> str:
    return character if character.isalnum() or ord(character) > 127 else f"\\{character}"
