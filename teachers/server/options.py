"""Options of captioners behind a server (family openai): what is checked and what the fingerprint covers.

The client library is not imported here, so that planning is fast and works where it is not installed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from teachers.redact import redact_values
from teachers.spec import CaptionerSpec

#: Name and version of how an image becomes a request and an answer becomes a caption; part of the fingerprint.
POLICY = "chat-completions-1"

_SIDE = 448  # pixels
_QUALITY = 90
_CONCURRENCY = 32
_TIMEOUT = 120.0  # seconds
_WAIT = 3600.0

_STRATEGIES = ("nucleus", "top_k", "greedy")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
#: Fields of a request that other options set.
_RESERVED = ("model", "messages", "max_tokens", "temperature", "top_p", "top_k", "seed", "n", "stream")


def check(spec: CaptionerSpec) -> None:
    """Raise ValueError if the options of a captioner behind a server are not usable."""
    if not spec.url:
        raise ValueError("family openai needs `url`, the address of a server, such as http://HOST:8000/v1")
    if spec.prompt is None:
        raise ValueError("family openai needs `prompt`, the instruction that is sent with each image")
    for url in addresses(spec.url):
        _check_url(url)
    if spec.strategy not in _STRATEGIES:
        raise ValueError(f"strategy {spec.strategy} is not used with family openai: use {', '.join(_STRATEGIES)}")
    given = {"pretrained", "precision", "compile", "min_length", "repetition_penalty"} & spec.model_fields_set
    if given:
        raise ValueError(
            f"{', '.join(sorted(given))}: not used with family openai; what your server takes beside the protocol "
            "goes into `options`"
        )
    if spec.api_key_env is not None and not _VARIABLE.fullmatch(spec.api_key_env):
        raise ValueError("api_key_env must be the name of an environment variable, not the key itself")
    if reserved := [name for name in _RESERVED if name in spec.options]:
        raise ValueError(f"options: {', '.join(reserved)}: set by the captioner's other keys, or by each request")


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("url must be http://HOST:PORT/v1 or https://HOST/v1")
    if parts.username is not None or parts.query:
        raise ValueError("url must not contain a user, a password or a query; name the key's variable in `api_key_env`")


def addresses(url: str | Sequence[str]) -> list[str]:
    """The base URLs of the servers. One without a path gets ``/v1``."""
    found = [url] if isinstance(url, str) else [*url]
    return [one.rstrip("/") + ("" if urlsplit(one).path.strip("/") else "/v1") for one in found]


def image_side(spec: CaptionerSpec) -> int:
    """Side in pixels of the images that are sent."""
    return spec.image_size or _SIDE


def image_quality(spec: CaptionerSpec) -> int:
    """Quality of their JPEGs."""
    return spec.image_quality or _QUALITY


def concurrency(spec: CaptionerSpec) -> int:
    """Requests of a worker that are under way at a time."""
    return spec.concurrency or _CONCURRENCY


def timeout(spec: CaptionerSpec) -> float:
    """Seconds for one request."""
    return spec.timeout or _TIMEOUT


def wait(spec: CaptionerSpec) -> float:
    """Seconds without an answer of any server after which the run ends."""
    return spec.wait or _WAIT


def sampling(spec: CaptionerSpec) -> dict[str, Any]:
    """Sampling fields of a request. ``top_k`` is not part of OpenAI's protocol; vLLM, SGLang and others take it."""
    fields: dict[str, Any] = {"max_tokens": spec.max_length}
    if spec.strategy == "greedy":
        return {**fields, "temperature": 0.0}
    if spec.strategy == "top_k":
        return {**fields, "temperature": spec.temperature, "top_k": spec.top_k}
    return {**fields, "temperature": spec.temperature, "top_p": spec.top_p}


def identity(spec: CaptionerSpec) -> dict[str, Any]:
    """What the fingerprint covers: not where the servers are, nor how they are asked.

    ``repeatable`` is false because neither the weights behind a model's name nor the handling of seeds can be checked.
    """
    return {
        "family": "openai",
        "policy": POLICY,
        "model": spec.model,
        "prompt": spec.prompt,
        "captions": spec.captions,
        "sampling": sampling(spec),
        "options": redact_values(spec.options),
        "image": {"format": "jpeg", "size": image_side(spec), "quality": image_quality(spec)},
        "repeatable": False,
    }
