"""Captions by servers that speak the chat completions protocol: vLLM, SGLang, TGI, ``transformers serve``, hosted ones.

Each caption is one request with the prompt, the image as a JPEG or the true caption, and a seed. Requests of a worker
run in parallel. The accelerator is not used while they are under way.

- A server that is down, overloaded or hangs costs waiting.
- An answer without a caption (a refusal, an empty text, one that is too long) and a request that the server rejects,
  while it answers one with a plain image, cost the caption. The others of the image fill its place; an image without
  any is quarantined with the reason of the first.
- A request that fails three times, each time after the server has answered a request with a plain image, is at fault
  itself and costs the caption, too.
- A server that rejects every request (an unknown model, a wrong key, a redirect, which is not followed) is an error
  of the config: at once before the first answer, later after a minute.
"""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from teachers.protocols import ImageSpec, NoCaptions, ServerUnavailable
from teachers.redact import REDACTED, redact
from teachers.server.family import QUALITY, ServerCaptionerSpec
from teachers.spec import CAPTION

if TYPE_CHECKING:
    import openai

DETAIL_CHARS = 300
_ANSWER_BYTES, _TOKEN_BYTES = 2**20, 2**12  # of any answer, and of each token in it, which may have log probabilities
_CAPTION_CHARS = 2**16
#: How refusals begin that arrive as an ordinary answer.
_REFUSAL = re.compile(r"(i['’]m|i am) (sorry|unable)\b|sorry,|i (can['’]t|cannot|can not)\b|as an ai\b", re.IGNORECASE)


class LongAnswer(ValueError):
    """An answer has more bytes than are read."""


def bound_answers(tokens: int, seconds: float) -> Callable[[Any], None]:
    """A hook of an HTTP client that bounds what is read of each response, to an answer of so many ``tokens``.

    Reading raises LongAnswer above that, or ends there if the response is an error, and raises ValueError after
    ``seconds``.
    """
    most = _ANSWER_BYTES + _TOKEN_BYTES * tokens

    def bound(response: Any) -> None:
        read, end = response.iter_bytes, time.monotonic() + seconds

        def iter_bytes(*arguments: Any, **named: Any) -> Iterator[bytes]:
            left = most
            for part in read(*arguments, **named):
                if time.monotonic() > end:
                    raise ValueError(f"the answer has not ended after {seconds:g} s")
                if len(part) > left and not response.is_error:
                    raise LongAnswer(f"the answer has more than {most:,} bytes")
                yield part[:left]
                if len(part) > left:
                    response.close()
                    return
                left -= len(part)

        response.iter_bytes = iter_bytes

    return bound


def read_answer(answer: Any) -> str | NoCaptions:
    """The caption in an answer, or why there is none."""
    choice = answer.choices[0]
    content = choice.message.content
    text = content.encode("utf-8", "replace").decode().strip() if isinstance(content, str) else ""
    if refusal := getattr(choice.message, "refusal", None):
        return NoCaptions(f"the model refuses: {str(refusal)[:DETAIL_CHARS]}")
    if choice.finish_reason == "content_filter":
        return NoCaptions("the server's content filter has withheld the answer")
    if not text:
        return NoCaptions(f"the answer is empty (finish_reason {str(choice.finish_reason)[:DETAIL_CHARS]})")
    if len(text) > _CAPTION_CHARS:
        return NoCaptions(f"the answer has {len(text):,} characters, above {_CAPTION_CHARS:,}")
    if _REFUSAL.match(text):
        return NoCaptions(f"the model refuses: {text[:DETAIL_CHARS]}")
    return text


# Servers share the requests of a captioner. The server with the fewest requests in flight is asked. One that fails is
# left alone for a while, twice as long after each failure, and then gets a single request; its answer ends the failure.
# Time without an answer of any server is bounded, and logged; by less where every server rejects what it is asked, as
# with a key that has expired.

FIRST_PAUSE = 0.5  # seconds
LONGEST_PAUSE = 30.0
REJECTED_SECONDS = 60.0  # a server behind a proxy may be rejected for a moment while it starts
_CHECK_SECONDS = 1.0  # between two looks at how long the servers have been waited for
_LOG_SECONDS = 60.0  # between two lines about servers that do not answer

_log = logging.getLogger(__name__)


@dataclass
class Server:
    """A server and its ``client``. It is asked again at ``free_from`` after ``failures`` in a row.

    ``reason`` is that of the last failure; ``rejects_since`` is when the first of the rejections in a row came.
    """

    address: str
    client: Any
    in_flight: int = 0
    failures: int = 0
    free_from: float = 0.0
    reason: str = ""
    rejects_since: float | None = None


class Servers:
    """The servers of the captioner ``name``, for all threads of a worker.

    ``wait`` is the longest time in seconds without an answer of any server while some are asked; at most
    REJECTED_SECONDS count where each rejects its requests.
    """

    def __init__(self, name: str, servers: Sequence[Server], wait: float) -> None:
        self._name, self._servers, self._wait = name, servers, wait
        self._changed = threading.Condition()
        self._down_since: float | None = None  # the first failure after the last answer of any server
        self._logged = 0.0
        self.answered = False  # whether any server ever did

    @contextlib.contextmanager
    def lend(self) -> Iterator[Server]:
        """A server for one request, as soon as one may be asked. Raises ServerUnavailable after the wait."""
        with self._changed:
            while True:
                now = time.monotonic()
                servers = self._servers
                reasons = "; ".join(f"{one.address}: {one.reason}" if one.reason else one.address for one in servers)
                rejecting = [one.rejects_since for one in servers if one.rejects_since is not None]
                if len(rejecting) == len(servers) and now - max(rejecting) > min(REJECTED_SECONDS, self._wait):
                    raise ServerUnavailable(
                        f"every request is rejected ({reasons}). Correct the address, the model or the key, and run "
                        "the same command again."
                    )
                if self._down_since is not None and now - self._down_since > self._wait:
                    raise ServerUnavailable(
                        f"no server has answered for {now - self._down_since:.0f} s ({reasons}); `wait` allows "
                        f"{self._wait:g}. Start the server and run the same command again."
                    )
                ready = [one for one in servers if one.free_from <= now and not (one.failures and one.in_flight)]
                if ready:
                    server = min(ready, key=lambda one: (one.failures > 0, one.in_flight))
                    server.in_flight += 1
                    break
                # A server that is being tried again ends its request before long, which notifies.
                times = [one.free_from - now for one in servers if one.free_from > now]
                self._changed.wait(min([*times, _CHECK_SECONDS]))
        try:
            yield server
        finally:
            with self._changed:
                server.in_flight -= 1
                self._changed.notify_all()

    def record_answer(self, server: Server) -> None:
        """Record that a server works."""
        with self._changed:
            if server.failures:
                _log.warning("captioner %s: %s answers again", self._name, server.address)
            server.failures, server.free_from, server.rejects_since = 0, 0.0, None
            self._down_since, self.answered = None, True
            self._changed.notify_all()

    def record_failure(self, server: Server, reason: str, rejected: bool = False, pause: float | None = None) -> None:
        """Record a failure; the server is asked again after ``pause`` seconds, if it names some.

        ``rejected`` is whether the server does not take this request, nor others.
        """
        with self._changed:
            now = time.monotonic()
            server.reason = reason
            server.rejects_since = (server.rejects_since or now) if rejected else None
            self._down_since = now if self._down_since is None else self._down_since
            if now < server.free_from:
                return  # a request that was under way when another one failed
            server.failures += 1
            doubled = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(server.failures - 1, 10))
            longest = doubled if pause is None else min(max(pause, doubled), 2 * LONGEST_PAUSE)
            server.free_from = now + longest * random.uniform(0.75, 1.0)  # noqa: S311
            if server.failures == 1 or now - self._logged > _LOG_SECONDS:
                self._logged = now
                _log.warning(
                    "captioner %s: %s: %s; waiting for it, %.0f of at most %g s so far",
                    *(self._name, server.address, reason, now - self._down_since, self._wait),
                )
            self._changed.notify_all()


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
        try:
            import openai
        except ImportError as error:
            raise ValueError(
                "family openai needs the package `openai`: pip install 'dataset-reinforcement[server]', on every node"
            ) from error
        key = None if spec.api_key_env is None else os.environ.get(spec.api_key_env)
        if spec.api_key_env is not None and not key:
            raise ValueError(
                f"the environment variable {spec.api_key_env} (api_key_env) is not set. Set it for the workers, too: "
                "on a cluster in the environment of its nodes."
            )
        self._openai: Any = openai
        self.captions = spec.captions
        self.reads_captions = spec.sees is not None
        self.image = ImageSpec(spec.side, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), resize="squash")
        self._spec, self._key = spec, key
        self._servers = Servers(name, [Server(url, self._client(url)) for url in spec.addresses], spec.wait or _WAIT)
        self._threads = ThreadPoolExecutor(spec.concurrency or _CONCURRENCY, thread_name_prefix="captions")
        fields = spec.sampling()
        # What the protocol does not have goes into the body as it is.
        self._body = {**spec.options, **({"top_k": fields.pop("top_k")} if "top_k" in fields else {})}
        self._fields = {**fields, "model": spec.model}
        self._plain = Request(_data_url(np.full((spec.side, spec.side, 3), 127, np.uint8), QUALITY), _PLAIN)

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
                request = Request(_data_url(image, QUALITY), caption)
                futures.append([self._threads.submit(self._ask, request, int(seed)) for seed in seeds])
            captions: list[list[str] | NoCaptions] = []
            for row in futures:
                if isinstance(row, NoCaptions):
                    captions.append(row)
                    continue
                answers = [one.result() for one in row]
                absent = [one for one in answers if isinstance(one, NoCaptions)]
                if len(absent) == len(answers):
                    captions.append(absent[0])
                    continue
                # The places of captions that the image does not have repeat the others.
                others = itertools.cycle([text for text in answers if isinstance(text, str)])
                captions.append([text if isinstance(text, str) else next(others) for text in answers])
            return captions
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
                    answer = self._send(server, request, seed)
                except (self._openai.APIError, ValueError) as error:
                    long = next((one for one in (error, error.__cause__) if isinstance(one, LongAnswer)), None)
                    if asked and long:
                        self._servers.record_answer(server)
                        return NoCaptions(str(long))
                    failures += 1
                    status = getattr(error, "status_code", None)
                    reason = self._describe(error, status)
                    rejected = status is not None and 300 <= status < 500 and status not in _TRANSIENT
                    if rejected and not self._servers.answered:
                        raise ValueError(f"{server.address} rejects a request: {reason}") from None
                    if asked and status in _REJECTED:
                        with contextlib.suppress(self._openai.APIError, ValueError):
                            self._ask_plainly(server)
                            return NoCaptions(f"the server rejects the request: {reason}")
                    strikes += answers and status not in _OVERLOADED
                    if strikes == _STRIKES:
                        return NoCaptions(f"the server answers other requests and fails at this one: {reason}")
                    pause = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "")  # seconds
                    seconds = float(pause) if re.fullmatch(r"\d{1,6}(\.\d+)?", pause) else None
                    self._servers.record_failure(server, reason, rejected, seconds)
                else:
                    self._servers.record_answer(server)
                    return read_answer(answer)

    def _ask_plainly(self, server: Server) -> None:
        """Test a server by a request with a plain image. Raises APIError and ValueError."""
        self._send(server, self._plain, 0)
        self._servers.record_answer(server)

    def _send(self, server: Server, request: Request, seed: int) -> Any:
        prompt, image = self._spec.prompt or "", {"type": "image_url", "image_url": {"url": request.image}}
        text = prompt.replace(CAPTION, request.caption) if self.reads_captions else prompt
        content = [*([] if self._spec.sees == "caption" else [image]), {"type": "text", "text": text}]
        answer = server.client.chat.completions.create(
            messages=[{"role": "user", "content": content}],
            seed=seed >> (64 - _SEED_BITS),
            extra_body=self._body,
            **self._fields,
        )
        if not getattr(answer, "choices", None) or getattr(answer.choices[0], "message", None) is None:
            raise ValueError("the answer is not a chat completion")  # something else may listen at the address
        return answer

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


def _data_url(image: np.ndarray, quality: int) -> str:
    """uint8 [H, W, 3] -> a JPEG as a data URL."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
