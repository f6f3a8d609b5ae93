"""A server that speaks the chat completions protocol: in this process, or as one of its own that can be killed.

``python -m tests.helpers.chat_server PORT FILE`` appends a byte to FILE for each answer.
"""

from __future__ import annotations

import base64
import contextlib
import http.server
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from tests.helpers.web import QuietHandler, serving

#: From the headers and the body of a request to the status and the body of the answer.
Answer: TypeAlias = "Callable[[Any, dict[str, Any]], tuple[int, dict[str, Any]]]"


def image_of(request: dict[str, Any]) -> Image.Image:
    (part,) = [part for part in request["messages"][0]["content"] if part["type"] == "image_url"]
    return Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2])))


def completion(text: str | None, finish_reason: str = "stop", refusal: str | None = None) -> dict[str, Any]:
    """The body of an answer."""
    message = {"role": "assistant", "content": text, "refusal": refusal}
    choice = {"index": 0, "finish_reason": finish_reason, "message": message}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "tiny", "choices": [choice]}


def describe(_: Any, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """A caption that depends on the image and the seed alone."""
    red, green, blue = image_of(request).resize((1, 1)).getpixel((0, 0))  # type: ignore[misc]
    return 200, completion(f"{red} red, {green} green and {blue} blue by {request['seed']}")


def _handler(answer: Answer, after: Callable[[], None] = lambda: None) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(QuietHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            status, body = answer(self.headers, json.loads(self.read_body()))
            self.answer(status, json.dumps(body).encode(), Content_Type="application/json")
            after()

    return Handler


@contextlib.contextmanager
def chat_server(answer: Answer = describe) -> Iterator[str]:
    with serving(_handler(answer)) as url:
        yield url


def start_process(port: int, count: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "tests.helpers.chat_server", str(port), str(count)])


def _main(port: str, count: str) -> None:
    def after() -> None:
        with open(count, "ab") as file:
            file.write(b".")
        time.sleep(0.02)

    http.server.ThreadingHTTPServer(("127.0.0.1", int(port)), _handler(describe, after)).serve_forever()


if __name__ == "__main__":
    _main(*sys.argv[1:])
