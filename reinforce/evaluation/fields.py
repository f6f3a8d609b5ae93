"""Labels and captions of a sample, read from its sidecars at a member's extension or at ``json:FIELD``.

Captions are also read by an expression of JMESPath (https://jmespath.org) over the JSON of the sample.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from reinforce.input_config import Limits
from reinforce.source.captions import caption_of, metadata_of, parse_json, texts_of

LINES = "lines:"
_JSON = "json:"
_JMESPATH = "jmespath:"


def is_json_field(value: object) -> bool:
    """Whether a config value has the form ``json:FIELD``."""
    return isinstance(value, str) and value.startswith(_JSON)


def is_in_json(field: str) -> bool:
    """Whether the captions at a field are in the JSON of the sample, and in no member of their own."""
    return field.startswith((_JSON, _JMESPATH))


def _check_caption_field(field: str) -> str:
    if field.startswith(_JMESPATH):
        import jmespath

        try:
            jmespath.compile(field.removeprefix(_JMESPATH))
        except jmespath.exceptions.JMESPathError as error:
            raise ValueError(f"{field!r} is no expression of JMESPath: {str(error).splitlines()[0]}") from error
    return field


#: Where a config finds captions, in the forms of ``read_captions``.
CaptionFields = Annotated[
    list[Annotated[str, AfterValidator(_check_caption_field)]],
    Field(
        min_length=1,
        description="where to find an image's captions, first hit wins: a member's extension, lines:EXTENSION for one "
        "caption per line, json:FIELD (text or a list of texts), or jmespath:EXPRESSION over the JSON; `txt` of a "
        "reinforced dataset is its caption; of tables: COLUMN, or json:COLUMN for all texts of a list",
    ),
]


def read_label(sidecars: Mapping[str, bytes], field: str) -> int | str | None:
    """Return a class index or class name; None where there is none.

    A member that holds an integer is an index, even if a class has that name. In JSON the type decides.
    """
    if is_json_field(field):
        value = read_json_field(sidecars, field)
        return value if isinstance(value, (int, str)) and not isinstance(value, bool) else None
    text = sidecars.get(field, b"").decode("utf-8-sig", "replace").strip()
    try:
        return int(text)
    except ValueError:
        return text or None


def read_captions(sidecars: Mapping[str, bytes], fields: Sequence[str], limits: Limits) -> tuple[str, ...]:
    """Return the distinct captions at the first field that has any, cleaned by the caption policy.

    ``lines:EXTENSION`` holds one caption per line. ``json:FIELD`` and the result of ``jmespath:EXPRESSION`` are a text
    or a list of texts.
    """
    for field in fields:
        texts: list[bytes] = []
        if field.startswith(LINES):
            texts = sidecars.get(field.removeprefix(LINES), b"").splitlines()
        elif is_in_json(field):
            value = read_json_field(sidecars, field) if is_json_field(field) else _search(sidecars, field)
            texts = [text.encode("utf-8", "replace") for text in texts_of(value)]
        elif field in sidecars:
            texts = [sidecars[field]]
        cleaned = (caption_of({"txt": text}, ["txt"], limits) for text in texts)
        captions = tuple(dict.fromkeys(caption for caption in cleaned if caption))
        if captions:
            return captions
    return ()


def read_json_field(sidecars: Mapping[str, bytes], field: str) -> Any:
    """Return the value at ``json:FIELD``; None where there is none."""
    name = field.removeprefix(_JSON)
    metadata = metadata_of(sidecars, [name])
    return None if metadata is None else json.loads(metadata)[name]


def _search(sidecars: Mapping[str, bytes], field: str) -> Any:
    """Return the result of ``jmespath:EXPRESSION``; None where the JSON has values of other types than it needs."""
    import jmespath  # loaded only for configs that have such a field

    try:
        return jmespath.search(field.removeprefix(_JMESPATH), parse_json(sidecars.get("json", b"")))
    except jmespath.exceptions.JMESPathError:
        return None
