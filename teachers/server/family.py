"""Captioners behind a server: what is checked and what the fingerprint covers.

The client library is not imported here, so that planning is fast and works where it is not installed.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from teachers.decoding.postprocess import cleaning_identity
from teachers.protocols import Captioner
from teachers.redact import redact_values
from teachers.server.options import ServerOptions
from teachers.spec import ModelInfo

#: Name and version of how an image becomes a request and an answer becomes a caption; part of the fingerprint.
POLICY = "chat-completions-1"

_STRATEGIES = ("nucleus", "top_k", "greedy")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
#: Fields of a request that other options set.
_RESERVED = ("model", "messages", "max_tokens", "temperature", "top_p", "top_k", "seed", "n", "stream")


class ServerCaptionerSpec(ServerOptions):
    def describe(self) -> ModelInfo:
        """The identity covers neither where the servers are, nor how they are asked.

        ``repeatable`` is false because neither the weights behind a model's name nor the handling of seeds can be
        checked.
        """
        self._check()
        identity = {
            "family": "openai",
            "policy": POLICY,
            "model": self.model,
            "prompt": self.prompt,
            "captions": self.captions,
            "sampling": self.sampling(),
            "options": redact_values(self.options),
            "image": {"format": "jpeg", "size": self.side, "quality": self.quality},
            "repeatable": False,
            **cleaning_identity(self.clean),
            **({"sees": self.sees} if self.sees else {}),  # absent without it, so that older fingerprints stay valid
        }
        return ModelInfo(dim=None, images=True, texts=self.sees is not None, identity=identity)

    def load(self, name: str, device: str) -> Captioner:
        from teachers.server.captioner import ServerCaptioner

        return ServerCaptioner(name, self)

    def _check(self) -> None:
        if not self.url:
            raise ValueError("family openai needs `url`, the address of a server, such as http://HOST:8000/v1")
        if self.prompt is None:
            raise ValueError("family openai needs `prompt`, the instruction that is sent with each image")
        for url in self.addresses:
            _check_url(url)
        if self.strategy not in _STRATEGIES:
            raise ValueError(f"strategy {self.strategy} is not used with family openai: use {', '.join(_STRATEGIES)}")
        given = {
            "pretrained",
            "precision",
            *self.fast_paths,
            "min_length",
            "repetition_penalty",
        } & self.model_fields_set
        if given:
            raise ValueError(
                f"{', '.join(sorted(given))}: not used with family openai; what your server takes beside the protocol "
                "goes into `options`"
            )
        if self.api_key_env is not None and not _VARIABLE.fullmatch(self.api_key_env):
            raise ValueError("api_key_env must be the name of an environment variable, not the key itself")
        if reserved := [name for name in _RESERVED if name in self.options]:
            raise ValueError(f"options: {', '.join(reserved)}: set by the captioner's other keys, or by each request")


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("url must be http://HOST:PORT/v1 or https://HOST/v1")
    if parts.username is not None or parts.query:
        raise ValueError("url must not contain a user, a password or a query; name the key's variable in `api_key_env`")
