"""Captions by servers that speak the chat completions protocol: vLLM, SGLang, TGI, ``transformers serve``, hosted ones.

Each caption is one request with the prompt, the image as a JPEG or the true caption, and a seed. Requests of a worker
run in parallel. The accelerator is not used while they are under way.

- A server that is down, overloaded or hangs costs waiting, see ``teachers.server.servers``.
- An answer without a caption (a refusal, an empty text, one that is too long) and a request that the server rejects,
  while it answers one with a plain image, cost the caption. The others of the image fill its place; an image without
  any is quarantined with the reason of the first.
- A request that fails three times, each time after the server has answered a request with a plain image, is at fault
  itself and costs the caption, too.
- A server that rejects every request (an unknown model, a wrong key, a redirect, which is not followed) is an error of
  the config: at once before the first answer, later after a minute.
"""

from __future__ import annotations

import base64
import io
import itertools
import os
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from teachers.caption_readers import CAPTION
from teachers.protocols import ImageSpec, NoCaptions
from teachers.redact import REDACTED, redact
from teachers.server.answers import DETAIL_CHARS, LongAnswer, bound_answers, check_answer, read_answer
from teachers.server.family import ServerCaptionerSpec
from teachers.server.servers import Server, Servers

if TYPE_CHECKING:
    import openai

_CONCURRENCY, _TIMEOUT, _WAIT = 32, 120.0, 3600.0  # requests, seconds, seconds
_STRIKES = 3
_PLAIN = "a photo"  # caption of the requests that test a server
_SEED_BITS = 31  # every server takes seeds of this size
_REJECTED = (400, 413, 422)  # the request, not the server
_OVERLOADED = (429, 503)
_TRANSIENT = (408, 409, 425, 429)


class Request(NamedTuple):
    """What is asked about: an image as a data URL, and its true caption."""

    image: str
    caption: str


class ServerCaptioner:
    """A ``Captioner`` behind one or several servers.

    Raises ValueError if the client library or the key's variable is missing.
    """

    #: The same images and seeds may get other captions; see ``teachers.protocols.Captioner``.
    repeatable = False
    #: ``to_texts`` waits for servers, within bounds of its own.
    waits = True

    def __init__(self, name: str, spec: ServerCaptionerSpec) -> None:
        self._openai = _import_client()
        self.captions = spec.captions
        self.reads_captions = spec.sees is not None
        self.image = ImageSpec(spec.side, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), resize="squash")
        self._spec, self._key, self._quality = spec, _api_key(spec), spec.quality
        self._servers = Servers(name, [Server(url, self._client(url)) for url in spec.addresses], spec.wait or _WAIT)
        self._threads = ThreadPoolExecutor(spec.concurrency or _CONCURRENCY, thread_name_prefix="captions")
        fields = spec.sampling()
        # What the protocol does not have goes into the body as it is.
        self._body = {**spec.options, **({"top_k": fields.pop("top_k")} if "top_k" in fields else {})}
        self._fields = {**fields, "model": spec.model}
        self._plain = Request(_data_url(np.full((spec.side, spec.side, 3), 127, np.uint8), self._quality), _PLAIN)

    def caption(self, pixels: torch.Tensor, seeds: np.ndarray) -> list[list[str] | NoCaptions]:
        """RGB [B, 3, H, W] in 0 to 1, uint64 seeds [B, captions] -> captions of each image, or why it has none."""
        return self.to_texts(self.generate(pixels, seeds))

    def generate(
        self, pixels: torch.Tensor, seeds: np.ndarray, captions: Sequence[str | None] | None = None
    ) -> tuple[np.ndarray, np.ndarray, Sequence[str | None]]:
        """Prepare the requests: images uint8 [B, H, W, 3], seeds and true captions. ``to_texts`` sends them."""
        images = pixels.mul(255).round_().to(torch.uint8).permute(0, 2, 3, 1)
        return images.contiguous().cpu().numpy(), seeds, captions or [_PLAIN] * len(pixels)

    def to_texts(self, prepared: tuple[np.ndarray, np.ndarray, Sequence[str | None]]) -> list[list[str] | NoCaptions]:
        """Send the requests and wait for the answers. Raises ServerUnavailable."""
        futures: list[list[Future[str | NoCaptions]] | NoCaptions] = []
        try:
            for image, seeds, caption in zip(*prepared, strict=True):
                if caption is None:
                    futures.append(NoCaptions("the sample has no true caption"))
                    continue
                request = Request(_data_url(image, self._quality), caption)
                futures.append([self._threads.submit(self._ask, request, int(seed)) for seed in seeds])
            return [row if isinstance(row, NoCaptions) else _fill([one.result() for one in row]) for row in futures]
        except BaseException:
            for future in itertools.chain.from_iterable(row for row in futures if isinstance(row, list)):
                future.cancel()
            raise

    def _ask(self, request: Request, seed: int) -> str | NoCaptions:
        """One caption, however long the servers are down."""
        failures = strikes = 0
        while True:
            with self._servers.lend() as server:
                # Whether the server has just answered another request, and whether it was asked this one.
                answers = asked = False
                try:
                    if failures > 1:
                        self._ask_plainly(server)
                        answers = True
                    asked = True
                    answer = check_answer(self._send(server, request, seed))
                except (self._openai.APIError, ValueError) as error:
                    if asked and (long := _long_answer(error)):
                        self._servers.record_answer(server)
                        return NoCaptions(str(long))
                    failures += 1
                    status = getattr(error, "status_code", None)
                    reason = self._describe(error, status)
                    rejected = status is not None and 300 <= status < 500 and status not in _TRANSIENT
                    if rejected and not self._servers.answered:
                        raise ValueError(f"{server.address} rejects a request: {reason}") from None
                    if asked and status in _REJECTED and self._answers_plainly(server):
                        return NoCaptions(f"the server rejects the request: {reason}")
                    strikes += answers and status not in _OVERLOADED
                    if strikes == _STRIKES:
                        return NoCaptions(f"the server answers other requests and fails at this one: {reason}")
                    self._servers.record_failure(server, reason, rejected, _retry_after(error))
                else:
                    self._servers.record_answer(server)
                    return read_answer(answer)

    def _ask_plainly(self, server: Server) -> None:
        """Test a server by a request with a plain image. Raises APIError and ValueError."""
        check_answer(self._send(server, self._plain, 0))
        self._servers.record_answer(server)

    def _answers_plainly(self, server: Server) -> bool:
        try:
            self._ask_plainly(server)
        except (self._openai.APIError, ValueError):
            return False
        return True

    def _send(self, server: Server, request: Request, seed: int) -> Any:
        prompt, image = self._spec.prompt or "", {"type": "image_url", "image_url": {"url": request.image}}
        text = prompt.replace(CAPTION, request.caption) if self.reads_captions else prompt
        content = [*([] if self._spec.sees == "caption" else [image]), {"type": "text", "text": text}]
        return server.client.chat.completions.create(
            messages=[{"role": "user", "content": content}],
            seed=seed >> (64 - _SEED_BITS),
            extra_body=self._body,
            **self._fields,
        )

    def _client(self, url: str) -> openai.OpenAI:
        key = self._key or "none"  # the client wants one
        timeout = self._spec.timeout or _TIMEOUT
        hooks = {"response": [bound_answers(self._spec.max_length, timeout)]}
        # A redirect would send the key, or the prompt without the image, to an address that the config does not name.
        http_client = self._openai.DefaultHttpxClient(timeout=timeout, event_hooks=hooks, follow_redirects=False)
        return self._openai.OpenAI(
            base_url=url,
            api_key=key,
            timeout=timeout,
            max_retries=0,
            http_client=http_client,
            default_headers={"Accept-Encoding": "identity"},
        )

    def _describe(self, error: Exception, status: int | None) -> str:
        text = str(error.__cause__ or error) if status is None else str(error)
        if status is not None and 300 <= status < 400:
            place = redact(error.response.headers.get("location", ""))  # type: ignore[attr-defined]
            text = f"status {status}, a redirect to {place!r}, which is not followed: set `url` to the server itself"
        text = text.replace(self._key, REDACTED) if self._key else text
        return f"{type(error).__name__}: {' '.join(text.split())[:DETAIL_CHARS]}"


def _long_answer(error: Exception) -> LongAnswer | None:
    """The LongAnswer that an error is, or was made of by the client."""
    return next((one for one in (error, error.__cause__) if isinstance(one, LongAnswer)), None)


def _fill(answers: Sequence[str | NoCaptions]) -> list[str] | NoCaptions:
    """The captions of an image; the places of those that it does not have repeat the others."""
    good = [text for text in answers if isinstance(text, str)]
    if not good:
        return next(one for one in answers if isinstance(one, NoCaptions))
    others = itertools.cycle(good)
    return [text if isinstance(text, str) else next(others) for text in answers]


def _data_url(image: np.ndarray, quality: int) -> str:
    """uint8 [H, W, 3] -> a JPEG as a data URL."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _retry_after(error: Exception) -> float | None:
    """Seconds after which the server asks to be tried again."""
    value = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "")
    return float(value) if re.fullmatch(r"\d{1,6}(\.\d+)?", value) else None


def _api_key(spec: ServerCaptionerSpec) -> str | None:
    if spec.api_key_env is None:
        return None
    key = os.environ.get(spec.api_key_env)
    if not key:
        raise ValueError(
            f"the environment variable {spec.api_key_env} (api_key_env) is not set. Set it for the workers, too: on a "
            "cluster in the environment of its nodes."
        )
    return key


def _import_client() -> Any:
    try:
        import openai
    except ImportError as error:
        raise ValueError(
            "family openai needs the package `openai`: pip install 'dataset-reinforcement[server]', on every node"
        ) from error
    return openai
