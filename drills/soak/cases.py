"""The faults of ``drills.soak.faults``, and how a run must end with each."""

from __future__ import annotations

import contextlib
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from drills.soak.bench import Bench
from tests.helpers.s3_proxy import Fault, Handler, Request, Response, cut, lose, refuse, run_first, shorten, slow

When: TypeAlias = "Callable[[Request], bool]"


@dataclass(frozen=True)
class Case:
    """A fault. ``inject`` lasts for a run; ``error`` is a pattern of its error, '' if it must be complete."""

    name: str
    inject: Callable[[Bench, str], AbstractContextManager[Any]]
    error: str = ""
    failures: Mapping[str, Any] = field(default_factory=dict)


# -- which requests


def any_request(_: Request) -> bool:
    return True


def is_source(request: Request) -> bool:
    return request.is_read and request.key.endswith(".tar")


def is_put(request: Request) -> bool:
    return request.method == "PUT"


def puts(part: str) -> When:
    return lambda request: is_put(request) and part in request.key


def below(part: str) -> When:
    return lambda request: f"/{part}" in f"{request.key}/{request.prefix}"


def next_page(request: Request) -> bool:
    return request.is_list and "continuation-token" in request.query


# -- when


def share(of: float, when: When = any_request) -> When:
    draw = random.Random(0)
    return lambda request: when(request) and draw.random() < of


def every_other(when: When) -> When:
    """The first, third, ... request for an object."""
    seen: Counter[str] = Counter()

    def selects(request: Request) -> bool:
        seen[request.key] += when(request)
        return when(request) and seen[request.key] % 2 == 1

    return selects


def faulty(fault: Fault, when: When, times: int | None = None, seconds: float | None = None) -> Any:
    """Inject a fault into requests; with ``seconds``, for so long, from the first file of a layer on."""

    def inject(bench: Bench, name: str) -> AbstractContextManager[Any]:
        first: list[float] = []

        def selects(request: Request) -> bool:
            if not when(request):
                return False
            if seconds is None:
                return True
            if not first:
                if not any(is_put(one) and one.key.endswith(".parquet") for one in bench.proxy.requests):
                    return False
                first.append(time.monotonic())
            return time.monotonic() - first[0] < seconds

        bench.proxy.requests.clear()
        return bench.proxy.inject(fault, selects, times)

    return inject


# -- what happens to them


def late(seconds: float) -> Fault:
    """Answer after some seconds."""

    def fault(handler: Handler, request: Request) -> None:
        time.sleep(seconds)
        handler.send(handler.forward(request), whole=request.method != "HEAD")

    return fault


def unanswered(handler: Handler, request: Request) -> None:
    """Do what is asked, and close the connection after two seconds without an answer."""
    handler.forward(request)
    time.sleep(2)
    handler.close_connection = True


def reset(handler: Handler, request: Request) -> None:
    """Close the connection without an answer."""
    handler.close_connection = True


def edited(pattern: bytes, by: bytes, query: str = "") -> Fault:
    """Answer with another body; ``query`` is added to the request."""

    def fault(handler: Handler, request: Request) -> None:
        handler.path += query
        answer = handler.forward(request)
        body = re.sub(pattern, by, answer.body, flags=re.DOTALL)
        kept = [(name, value) for name, value in answer.headers if name.lower() != "content-length"]
        handler.send(Response(answer.status, [*kept, ("Content-Length", str(len(body)))], body))

    return fault


#: A listing in pages of two names.
two_names = edited(rb"$^", b"", "&max-keys=2")


def both(*faults: Any) -> Any:
    """Inject several faults; the first that selects a request affects it."""

    @contextlib.contextmanager
    def inject(bench: Bench, name: str) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for fault in faults:
                stack.enter_context(fault(bench, name))
            yield

    return inject


def replaced_source(bench: Bench, name: str) -> AbstractContextManager[Any]:
    """A source object that is written anew between two requests of one reader."""
    path = f"bucket/{name}/source/0.tar"
    whole = bench.s3.cat_file(path)
    bench.s3.pipe_file(path, whole[:-1024] + bytes(1024))
    return bench.proxy.inject(
        run_first(lambda: bench.s3.pipe_file(path, whole)), lambda r: is_source(r) and r.key == path, 1
    )


def _claim(bench: Bench, name: str, layer: str, ago: float, **values: Any) -> str:
    """Write a claim of a killed run of another config -> its path."""
    path = f"bucket/{name}/out/claims/{layer}.json"
    claim = {"layer": layer, "fingerprint": "0", "token": "0", "host": "x", "time": time.time() - ago, **values}
    bench.s3.pipe_file(path, json.dumps(claim).encode())
    return path


def old_claims(bench: Bench, name: str) -> AbstractContextManager[Any]:
    """Claims by clocks a year behind and a year ahead."""
    _claim(bench, name, "samples", 3e7)
    _claim(bench, name, "embeddings@red@images", -3e7)
    return contextlib.nullcontext()


@contextlib.contextmanager
def fresh_claim(bench: Bench, name: str) -> Iterator[None]:
    """A claim of a run that was killed a moment ago; it is deleted afterwards, as the error says."""
    path = _claim(bench, name, "samples", 0, manifest={})
    yield
    bench.s3.rm_file(path)


@contextlib.contextmanager
def second_driver(bench: Bench, name: str) -> Iterator[None]:
    """Another run of the same config at the same time."""
    other = threading.Thread(target=lambda: bench.run(name))
    other.start()
    yield
    other.join()


_EXPIRED = refuse(403, "ExpiredToken", "The provided token has expired.")
_SLOW_DOWN = refuse(503, "SlowDown", "Please reduce your request rate.")
_DENIED = refuse(403, "AccessDenied", "Access Denied")
_SHORT = {"outage_seconds": 5.0}
_TOKEN = refuse(400, "InvalidArgument", "The continuation token provided is incorrect")

CASES = [
    Case("503 for 10 % of the requests", faulty(_SLOW_DOWN, share(0.1))),
    Case("503 for 50 % of the requests", faulty(_SLOW_DOWN, share(0.5))),
    Case("500 for 30 % of the requests", faulty(refuse(500, "InternalError"), share(0.3))),
    Case("500 for 50 % of the puts", faulty(refuse(500, "InternalError"), share(0.5, is_put))),
    Case("resets for 10 % of the requests", faulty(reset, share(0.1))),
    Case("resets for half of the reads of the source", faulty(reset, share(0.5, is_source))),
    Case("30 % of the bodies of the source are cut", faulty(cut, share(0.3, is_source))),
    Case("half of the bodies are cut", faulty(cut, share(0.5, lambda r: r.is_read))),
    Case("empty bodies with a fitting length", faulty(shorten(0.0), every_other(lambda r: r.is_read))),
    Case("half bodies with a fitting length", faulty(shorten(0.5), every_other(lambda r: r.is_read))),
    Case("a source that only sends half bodies", faulty(shorten(0.5), is_source), "the storage sent|cannot be read",
         _SHORT),
    Case("2 s before each answer for the source", faulty(late(2.0), is_source)),
    Case("10 s before some answers", faulty(late(10.0), share(0.1), times=4)),
    Case("bodies that come in pieces", faulty(slow(0.3), is_source)),
    Case("the token has expired for 20 s, source", faulty(_EXPIRED, is_source, seconds=20)),
    Case("the token has expired for 20 s, puts", faulty(_EXPIRED, is_put, seconds=20)),
    Case("all is refused for 20 s", faulty(_DENIED, any_request, seconds=20)),
    Case("503 for 60 s", faulty(_SLOW_DOWN, any_request, seconds=60)),
    Case("503 for 90 s, puts", faulty(_SLOW_DOWN, is_put, seconds=90)),
    Case("503 for ever for one prefix", faulty(_SLOW_DOWN, puts("embeddings/red")), "reduce your request", _SHORT),
    Case("one 404 for the source", faulty(refuse(404, "NoSuchKey"), is_source, times=1, seconds=60)),
    Case("one 404 for a put", faulty(refuse(404, "NoSuchBucket"), puts(".parquet"), times=1)),
    Case("one 403 for a put", faulty(_DENIED, puts(".parquet"), times=1)),
    Case("one 403 for dataset.json", faulty(_DENIED, puts("dataset.json"), times=1)),
    Case("a clock that is wrong for 10 s", faulty(refuse(403, "RequestTimeTooSkewed"), is_source, seconds=10)),
    Case("501 for If-None-Match", faulty(refuse(501, "NotImplemented"), lambda r: "If-None-Match" in r.headers)),
    Case("puts that are written and then stalled", faulty(unanswered, puts(".parquet"), times=4)),
    Case("a put of samples that is answered and not written", faulty(lose, puts("/samples/"), times=1)),
    Case("puts of embeddings that are answered and not written", faulty(lose, puts("/embeddings/"), times=3)),
    Case("a dataset.json that is answered and not written", faulty(lose, puts("dataset.json"), times=1)),
    Case("a dataset.json that is never written", faulty(lose, puts("dataset.json")), "not what was written", _SHORT),
    Case("the listing at the end lags",
         faulty(edited(rb"<Contents>.*</Contents>", b""), lambda r: r.is_list and "embeddings" in r.prefix)),
    Case("listings in pages of two names", faulty(two_names, lambda r: r.is_list)),
    Case("listings that repeat a page",
         faulty(edited(rb"(<Contents>.*</Contents>)", rb"\1\1"), lambda r: r.is_list, times=3)),
    Case("a continuation token that has expired",
         both(faulty(_TOKEN, next_page, times=2), faulty(two_names, lambda r: r.is_list))),
    Case("a page without a continuation token",
         both(faulty(edited(rb"<NextContinuationToken>.*</NextContinuationToken>", b"", "&max-keys=2"), next_page, 1),
              faulty(two_names, lambda r: r.is_list))),
    Case("one refusal of the first write", faulty(_EXPIRED, puts("/.tmp/"), times=1)),
    Case("a target that may not be written", faulty(_DENIED, is_put), "cannot be written"),
    Case("a target that is full", faulty(refuse(507, "InsufficientStorage"), is_put, seconds=600), "Insufficient|507",
         _SHORT),
    Case("wrong credentials", faulty(refuse(403, "InvalidAccessKeyId"), any_request), "cannot be written"),
    Case("a source that may not be read", faulty(_DENIED, is_source), "no sample can be read.*Access Denied"),
    Case("a refusal of runs/ alone", faulty(_DENIED, below("runs"))),
    Case("a refusal of index/ alone", faulty(_DENIED, below("index"))),
    Case("a refusal of claims/ alone", faulty(_DENIED, below("claims")), "claims"),
    Case("a source that is replaced while it is read", replaced_source),
    Case("claims of killed runs, and clocks set back and forth", old_claims),
    Case("a claim of a run that was killed a moment ago", fresh_claim, "another run writes"),
    Case("two drivers", second_driver),
]  # fmt: skip
