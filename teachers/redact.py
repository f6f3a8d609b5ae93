"""What may be told or stored of URLs, options and error messages: no passwords, tokens and signatures."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

REDACTED = "(secret)"
#: Schemes in which what stands before the ``@`` is a container or a repository.
CONTAINER_SCHEMES = frozenset({"abfs", "abfss", "wasb", "wasbs", "github"})
_SHORTEST = 6  # characters; a shorter secret is a word that stands in any text
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^\s'\"<>\\]*)")
_NAME = re.compile(
    r"(.*_)?(password|passwd|passphrase|pwd|secrets?|credentials?|authorization|connection_string)"
    r"|((.*_)?(hf|hub|auth|api|access|bearer|session|security|refresh|sas|github|gitlab|secret|private)_)?token"
    r"|(.*_)?(api|access|secret|private|account|shared|encryption|signing|sas)_?key(_id)?"
)
_PARAMETER = re.compile(r"sig|token|secret|password|credential|key", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether an option or variable of this name holds a secret: ``hf_token``, ``apiKey``, ``AWS_SECRET_ACCESS_KEY``.

    ``pad_token``, ``sort_key`` and ``max_tokens`` do not.
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    return _NAME.fullmatch(re.sub(r"[^a-z0-9]+", "_", words).strip("_")) is not None


def redact_values(value: Any) -> Any:
    """A value of a config as it may be stored: secret options are ``(secret)``, URLs have no user and no signature."""
    if isinstance(value, Mapping):
        return {key: REDACTED if _hides(key, inner) else redact_values(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_values(inner) for inner in value]
    return _URL.sub(_without_signature, value) if isinstance(value, str) else value


def redact(text: str) -> str:
    """Text with its URLs as they may be told: no user, password, query or fragment."""
    return _URL.sub(lambda url: f"{url[1]}://{_address(url[1], re.split('[?#]', url[2])[0])}", text)


class Redactor:
    """Takes the secrets of a config and of the environment out of whatever is told: messages, events, quarantine."""

    def __init__(self, values: Any) -> None:
        known = {*_secrets_in(values), *(os.environ[name] for name in os.environ if is_secret(name))}
        spelt = {how(secret) for secret in known for how in (str, quote, unquote, _in_json)}
        self._secrets = sorted((secret for secret in spelt if len(secret) >= _SHORTEST), key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, REDACTED)
        return redact(text)


def _hides(name: Any, value: Any) -> bool:
    return isinstance(name, str) and is_secret(name) and not isinstance(value, (bool, int, float, type(None)))


def _without_signature(url: re.Match[str]) -> str:
    address, mark, query = url[2].partition("?")
    signed = any(_PARAMETER.search(name) for name, _ in parse_qsl(query, keep_blank_values=True))
    return f"{url[1]}://{_address(url[1], address)}" + ("" if signed else mark + query)


def _address(scheme: str, address: str) -> str:
    """Host and path."""
    authority, slash, path = address.partition("/")
    return (authority if scheme.lower() in CONTAINER_SCHEMES else authority.rpartition("@")[2]) + slash + path


def _secrets_in(value: Any, hidden: bool = False) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _secrets_in(inner, hidden or _hides(name, inner))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _secrets_in(inner, hidden)
    elif isinstance(value, str):
        if hidden:
            yield value
        yield from _secrets_of_urls(value)


def _secrets_of_urls(text: str) -> Iterable[str]:
    for url in _URL.finditer(text):
        address, _, query = url[2].partition("?")
        user, at, _ = address.partition("/")[0].rpartition("@")
        if at and url[1].lower() not in CONTAINER_SCHEMES:
            yield user
            yield from user.split(":", 1)[1:]
        yield from (value for name, value in parse_qsl(query) if _PARAMETER.search(name))


def _in_json(text: str) -> str:
    return json.dumps(text)[1:-1]
