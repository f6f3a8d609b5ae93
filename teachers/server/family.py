"""Captioners behind a server: their keys, what is checked, what is sent, and what the fingerprint covers.

The client library is not imported here, so that planning is fast and works where it is not installed.
"""

from __future__ import annotations

import importlib
import re
from typing import Any, ClassVar
from urllib.parse import urlsplit

from pydantic import Field

from teachers.decoding.postprocess import cleaning_identity
from teachers.protocols import Captioner
from teachers.redact import redact_values
from teachers.spec import CaptionReaderSpec, ModelInfo

#: Name and version of how an image becomes a request and an answer becomes a caption; part of the fingerprint.
POLICY = "chat-completions-1"

_STRATEGIES = ("nucleus", "top_k", "greedy")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
#: Fields of a request that other options set.
_RESERVED = ("model", "messages", "max_tokens", "temperature", "top_p", "top_k", "seed", "n", "stream")
_SIDE = 448  # pixels
#: Quality of the JPEGs that are sent. Captions depend on it, so it is one for all datasets.
QUALITY = 90


class ServerCaptionerSpec(CaptionReaderSpec):
    uses_precision: ClassVar[bool] = False
    takes_options: ClassVar[bool] = True

    url: str | list[str] | None = Field(
        None, description="openai: address of the server, such as http://HOST:8000/v1, or a list of equal servers"
    )
    api_key_env: str | None = Field(None, description="openai: environment variable that holds the API key")
    concurrency: int | None = Field(
        None, ge=1, le=1024, description="openai: requests of a worker under way at a time; default: 32"
    )
    timeout: float | None = Field(
        None, gt=0, description="openai: seconds for one request, after which it is sent again; default: 120"
    )
    wait: float | None = Field(
        None,
        gt=0,
        description="openai: seconds without an answer of any server after which the run ends; default: 3600",
    )

    @property
    def addresses(self) -> list[str]:
        """The base URLs of the servers. One without a path gets ``/v1``."""
        found = [self.url or ""] if isinstance(self.url, (str, type(None))) else self.url
        return [one.rstrip("/") + ("" if urlsplit(one).path.strip("/") else "/v1") for one in found]

    @property
    def side(self) -> int:
        """Side in pixels of the images that are sent."""
        return self.image_size or _SIDE

    def sampling(self) -> dict[str, Any]:
        """Sampling fields of a request. ``top_k`` is not part of OpenAI's protocol; vLLM, SGLang and others take it."""
        fields: dict[str, Any] = {"max_tokens": self.max_length}
        if self.strategy == "greedy":
            return {**fields, "temperature": 0.0}
        if self.strategy == "top_k":
            return {**fields, "temperature": self.temperature, "top_k": self.top_k}
        return {**fields, "temperature": self.temperature, "top_p": self.top_p}

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
            "image": {"format": "jpeg", "size": self.side, "quality": QUALITY},
            "repeatable": False,
            **cleaning_identity(self.clean),
            **({"sees": self.sees} if self.sees else {}),
        }
        return ModelInfo(dim=None, images=True, texts=self.sees is not None, identity=identity)

    def load(self, name: str, device: str) -> Captioner:
        captioner: Captioner = importlib.import_module("teachers.server.captioner").ServerCaptioner(name, self)
        return captioner

    def _check(self) -> None:
        if not self.url:
            raise ValueError("family openai needs `url`, the address of a server, such as http://HOST:8000/v1")
        if self.prompt is None:
            raise ValueError("family openai needs `prompt`, the instruction that is sent with each image")
        for url in self.addresses:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("url must be http://HOST:PORT/v1 or https://HOST/v1")
            if parts.username is not None or parts.query:
                raise ValueError(
                    "url must not contain a user, a password or a query; name the key's variable in `api_key_env`"
                )
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
