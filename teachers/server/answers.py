"""Answers of servers: bounds on what is read of them, and the caption in one."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from teachers.protocols import NoCaptions

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


def check_answer(answer: Any) -> Any:
    """Raise ValueError unless an answer is one of the protocol: something else may listen at the address."""
    if not getattr(answer, "choices", None) or getattr(answer.choices[0], "message", None) is None:
        raise ValueError("the answer is not a chat completion")
    return answer
