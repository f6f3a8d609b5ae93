"""What of a dataset may be published: public addresses, settings without paths and secrets."""

from __future__ import annotations

import functools
import ipaddress
import json
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from reinforce.labels.identities import normal_url
from teachers.redact import redact_values

HIDDEN_PATH = "(local path)"
_PATH = re.compile(r"(?:file|local|local-dir):|[A-Za-z]:[\\/]|~?/[^/]|\.{1,2}[\\/]|\\\\")
_MAX_TEXT, _MAX_URL = 512, 4096  # characters of a uid, and of a URL


def public_url(url: str) -> str | None:
    """A web address in the spelling by which labels are joined; None for others.

    Others are local paths, hosts of a private network, and URLs with a user, password or signature.
    """
    if len(url) > _MAX_URL or not url.lower().startswith(("http://", "https://")):
        return None
    if ("@" in url or "?" in url) and redact_values(url) != url:
        return None
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return None
    return normal_url(url) if _is_public_host(host) else None


@functools.lru_cache(maxsize=2**14)
def _is_public_host(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return "." in host and not host.endswith((".local", ".internal", ".localhost"))


def public_text(text: str) -> str | None:
    """A uid; None if it is a local path, or too long for one."""
    return None if len(text) > _MAX_TEXT or is_local_path(text) or redact_values(text) != text else text


def is_local_path(value: str) -> bool:
    """Whether a setting names a file of this machine."""
    return _PATH.match(value) is not None or (("/" in value or "\\" in value) and os.path.exists(value))


def without_paths(value: Any) -> Any:
    """A copy of settings without secrets, and with ``(local path)`` for each local path."""
    if isinstance(value, Mapping):
        return redact_values({name: without_paths(inner) for name, inner in value.items()})
    if isinstance(value, list):
        return [without_paths(inner) for inner in value]
    return HIDDEN_PATH if isinstance(value, str) and is_local_path(value) else redact_values(value)


def has_hidden(value: Any) -> bool:
    """Whether ``without_paths`` has hidden a path in a setting."""
    return f'"{HIDDEN_PATH}"' in json.dumps(value)
