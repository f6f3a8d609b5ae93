"""Removal of passwords, tokens and signatures from text, config values and URLs that are logged or stored."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

REDACTED = "(secret)"
#: Schemes in which the part before the ``@`` is a container or a repository, not a user.
CONTAINER_SCHEMES = frozenset({"abfs", "abfss", "wasb", "wasbs", "github"})
_MIN_SECRET_CHARS = 6  # a shorter one would match ordinary words
_CUT_CHARS = 20_000  # of a text that is cut before it is redacted
_DELIMITERS = r"\s'\"<>\\"  # end a URL in a text
#: What is before a scheme, the scheme, and the rest. A run of word characters is scanned from its beginning alone.
_URL = re.compile(rf"(?<![A-Za-z0-9+.-])([0-9+.-]*)([A-Za-z][A-Za-z0-9+.-]*)://([^{_DELIMITERS}]*)")
_DELIMITER = re.compile(rf"[{_DELIMITERS}]")
_SECRET_NAME = re.compile(
    r"(.*_)?(password|passwd|passphrase|pwd|secrets?|credentials?|authorization|connection_string)"
    r"|((.*_)?(hf|hub|auth|api|access|bearer|session|security|refresh|sas|github|gitlab|secret|private)_)?token"
    r"|(.*_)?(api|access|secret|private|account|shared|encryption|signing|sas)_?key(_id)?"
)
_FOLDER_VARIABLES = frozenset({"PWD", "OLDPWD"})  # set by the shell, not passwords as in MYSQL_PWD
_SECRET_VARIABLE = re.compile(r".*(PASSWORD|PASSWD|PASSPHRASE|_TOKEN)", re.IGNORECASE)  # PGPASSWORD, CI_JOB_TOKEN
_SECRET_PARAMETER = re.compile(r"sig|token|secret|password|credential|key", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether an option or variable of this name holds a secret: ``hf_token``, ``apiKey``, ``AWS_SECRET_ACCESS_KEY``.

    ``pad_token``, ``sort_key`` and ``max_tokens`` do not.
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    return _SECRET_NAME.fullmatch(re.sub(r"[^a-z0-9]+", "_", words).strip("_")) is not None


def redact_values(value: Any) -> Any:
    """Copy a config value for storage: secret options become ``(secret)``, URLs lose user, password and signature."""
    if isinstance(value, Mapping):
        return {
            name: REDACTED if _is_secret_option(name, inner) else redact_values(inner) for name, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redact_values(inner) for inner in value]
    return redact(value, keep_query=True) if isinstance(value, str) else value


def redact(text: str, keep_query: bool = False) -> str:
    """Remove user, password, query and fragment from the URLs in a text, in time linear in its length.

    With ``keep_query`` only queries that hold a secret are removed, such as signatures.
    """
    if "://" not in text:
        return text

    def clean(url: re.Match[str]) -> str:
        before, scheme, rest = url.groups()
        address, mark, query = rest.partition("?")
        kept = mark + query
        if not keep_query:
            address, kept = address.partition("#")[0], ""
        elif any(_SECRET_PARAMETER.search(name) for name, _ in parse_qsl(query, keep_blank_values=True)):
            kept = ""
        authority, slash, path = address.partition("/")
        if scheme.lower() not in CONTAINER_SCHEMES:
            authority = authority.rpartition("@")[2]  # without user and password
        return f"{before}{scheme}://{authority}{slash}{path}{kept}"

    return _URL.sub(clean, text)


class Redactor:
    """Removes the secrets of a config and of the environment from messages, events and quarantine details.

    Its time for a text is linear in the length of the text, and does not depend on the number of secrets: 10,000
    presigned URLs have 100,000 spellings of them.
    """

    def __init__(self, values: Any) -> None:
        secrets = {*_secrets_in(values)}
        for name, value in os.environ.items():
            if name not in _FOLDER_VARIABLES and (is_secret(name) or _SECRET_VARIABLE.fullmatch(name)):
                secrets.add(value)
        spellings = secrets.union(*((quote(one), unquote(one), json.dumps(one)[1:-1]) for one in secrets))
        self._secrets = frozenset(secret for secret in spellings if len(secret) >= _MIN_SECRET_CHARS)
        lengths: dict[str, set[int]] = {}
        for secret in self._secrets:
            lengths.setdefault(secret[:_MIN_SECRET_CHARS], set()).add(len(secret))
        self._lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}  # by their beginnings
        self._longest = max(map(len, self._secrets), default=0)

    def __call__(self, text: str) -> str:
        return redact(self._without_secrets(text, 0, len(text)))

    def cut(self, text: str, characters: int = _CUT_CHARS) -> str:
        """Redact a text, of one with more ``characters`` its beginning and its end.

        The time does not depend on the length of the text. A secret that a cut divides is removed, and so are a URL at
        the end of the beginning, apart from its scheme, and the word at the beginning of the end.
        """
        if len(text) <= characters:
            return self(text)
        half = characters // 2
        head, tail = self._without_secrets(text, 0, half), self._without_secrets(text, len(text) - half, len(text))
        last, first = len(head) - len(_DELIMITER.split(head)[-1]), len(_DELIMITER.split(tail, maxsplit=1)[0])
        before, scheme_end, _ = head[last:].partition("://")
        return f"{redact(head[:last] + before)}{scheme_end} ... {redact(tail[first:])}"

    def _without_secrets(self, text: str, start: int, stop: int) -> str:
        """The text from ``start`` to ``stop`` without secrets, also those that only end or only begin in it."""
        parts, end = [], start  # what lies before ``end`` is in ``parts``
        first, last = max(0, start - self._longest), min(stop, len(text) - _MIN_SECRET_CHARS + 1)
        for place in range(first, last) if self._secrets else ():
            lengths = self._lengths.get(text[place : place + _MIN_SECRET_CHARS])
            if lengths is None:
                continue
            secret_end = next((place + n for n in lengths if text[place : place + n] in self._secrets), 0)
            if secret_end <= end:
                continue  # no secret, or one within the last one
            if place >= end:
                parts += [text[end:place], REDACTED]
            end = secret_end  # a secret that begins within the last one is removed with it
        return "".join([*parts, text[end:stop]])


def _is_secret_option(name: Any, value: Any) -> bool:
    return isinstance(name, str) and is_secret(name) and not isinstance(value, (bool, int, float, type(None)))


def _secrets_in(value: Any, hidden: bool = False) -> Iterator[str]:
    """Yield every string under a secret option, and the secrets within URLs."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _secrets_in(inner, hidden or _is_secret_option(name, inner))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _secrets_in(inner, hidden)
    elif isinstance(value, str):
        if hidden:
            yield value
        for url in _URL.finditer(value):
            address, _, query = url[3].partition("?")
            user, at, _ = address.partition("/")[0].rpartition("@")
            if at and url[2].lower() not in CONTAINER_SCHEMES:
                yield user
                yield from user.split(":", 1)[1:]
            yield from (secret for name, secret in parse_qsl(query) if _SECRET_PARAMETER.search(name))
