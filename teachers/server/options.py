"""Keys of captioners behind a server, and how they are sent."""

from __future__ import annotations

from typing import Any, ClassVar
from urllib.parse import urlsplit

from pydantic import Field

from teachers.caption_readers import CaptionReaderSpec

_SIDE = 448  # pixels
_QUALITY = 90


class ServerOptions(CaptionReaderSpec):
    uses_precision: ClassVar[bool] = False
    takes_options: ClassVar[bool] = True

    url: str | list[str] | None = Field(
        None, description="openai: address of the server, such as http://HOST:8000/v1, or a list of equal servers"
    )
    api_key_env: str | None = Field(None, description="openai: environment variable that holds the API key")
    image_quality: int | None = Field(
        None, ge=1, le=100, description="openai: quality of the JPEG that is sent; default: 90"
    )
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

    @property
    def quality(self) -> int:
        """Quality of their JPEGs."""
        return self.image_quality or _QUALITY

    def sampling(self) -> dict[str, Any]:
        """Sampling fields of a request. ``top_k`` is not part of OpenAI's protocol; vLLM, SGLang and others take it."""
        fields: dict[str, Any] = {"max_tokens": self.max_length}
        if self.strategy == "greedy":
            return {**fields, "temperature": 0.0}
        if self.strategy == "top_k":
            return {**fields, "temperature": self.temperature, "top_k": self.top_k}
        return {**fields, "temperature": self.temperature, "top_p": self.top_p}
