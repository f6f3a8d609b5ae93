"""Captions by servers: what is sent, what answers become, and what a server that is down costs."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from reinforce.processes.imports import installed
from teachers.protocols import NoCaptions, ServerUnavailable
from teachers.registry import describe_model, load_model
from teachers.spec import CaptionerSpec
from tests.helpers.chat_server import Answer, chat_server, completion, describe, image_of
from tests.helpers.data import free_port
from tests.helpers.specs import captioner_spec
from tests.helpers.web import QuietHandler, serving

pytestmark = pytest.mark.skipif(not installed("openai"), reason="needs the extra server")

SIDE = 32
GRAY, RED = np.array([127, 127, 127]), np.array([255, 0, 0])


def spec_of(url: str | list[str], **options: Any) -> CaptionerSpec:
    given = {"family": "openai", "url": url, "model": "tiny", "prompt": "Describe.", "captions": 1, "image_size": SIDE}
    return captioner_spec(**{**given, **options})


def caption(url: str | list[str], colors: list[np.ndarray], **options: Any) -> list[Any]:
    """The captions of images of one colour each, with seeds 2 ** 33 and up."""
    captioner = load_model("vlm", spec_of(url, **options), "cpu")
    pixels = torch.tensor(np.array(colors), dtype=torch.float32).div(255)[:, :, None, None].expand(-1, -1, SIDE, SIDE)
    seeds = (np.arange(len(colors) * captioner.captions, dtype=np.uint64) << np.uint64(33)).reshape(len(colors), -1)
    return list(captioner.caption(pixels, seeds))


def by_color(red: Any) -> Answer:
    """Answers for a red and for any other image."""
    gray = 200, completion("a wall")
    return lambda _, request: red if image_of(request).resize((1, 1)).getpixel((0, 0))[0] > 200 else gray  # type: ignore[index]


def test_each_caption_is_one_request_with_the_image_as_a_jpeg_and_its_own_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    seen: list[Any] = []

    def answer(headers: Any, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        seen.append((headers["Authorization"], image_of(request), request))
        return describe(headers, request)

    with chat_server(answer) as url:
        options = {"captions": 2, "strategy": "top_k", "top_k": 7, "max_length": 40, "options": {"min_p": 0.1}}
        rows = caption(url, [GRAY, RED], api_key_env="MY_KEY", **options)
    assert rows == [
        ["127 red, 127 green and 127 blue by 0", "127 red, 127 green and 127 blue by 1"],
        ["254 red, 0 green and 0 blue by 2", "254 red, 0 green and 0 blue by 3"],
    ]
    key, image, request = seen[0]
    assert (key, image.format, image.size) == ("Bearer sk-secret", "JPEG", (SIDE, SIDE))
    sent = {name: request[name] for name in ("model", "max_tokens", "temperature", "top_k", "min_p")}
    assert sent == {"model": "tiny", "max_tokens": 40, "temperature": 1.0, "top_k": 7, "min_p": 0.1}
    assert request["messages"][0]["content"][1] == {"type": "text", "text": "Describe."}


def test_a_request_that_sees_the_caption_has_it_in_the_prompt_and_the_image_only_with_both() -> None:
    prompt = "Translate {caption} to German: {caption}"
    for sees, parts in (("caption", ["text"]), ("both", ["image_url", "text"])):
        seen: list[Any] = []

        def answer(_: Any, request: dict[str, Any], seen: list[Any] = seen) -> tuple[int, dict[str, Any]]:
            seen.append(request["messages"][0]["content"])
            return 200, completion(seen[-1][-1]["text"])

        with chat_server(answer) as url:
            captioner: Any = load_model("de", spec_of(url, prompt=prompt, sees=sees, concurrency=1), "cpu")
            seeds = np.zeros((3, 1), np.uint64)
            found = captioner.to_texts(captioner.generate(torch.zeros(3, 3, SIDE, SIDE), seeds, ["a {x}", None, "b"]))
            assert [*map(len, captioner.caption(torch.zeros(2, 3, SIDE, SIDE), seeds[:2]))] == [1, 1], "a self-test"
        assert (found[0], found[2]) == (["Translate a {x} to German: a {x}"], ["Translate b to German: b"])
        assert isinstance(found[1], NoCaptions)
        assert found[1].detail == "the sample has no true caption"
        assert {tuple(part["type"] for part in content) for content in seen} == {tuple(parts)}
    with pytest.raises(ValueError, match=r"`sees: caption` needs \{caption\} in the prompt"):
        describe_model("de", spec_of("http://a:1/v1", sees="caption"))
    with chat_server(lambda _, request: (200, completion(request["messages"][0]["content"][1]["text"]))) as url:
        assert caption(url, [GRAY], prompt="{caption}") == [["{caption}"]], "an ordinary prompt"


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        ((200, completion("  ")), "the answer is empty (finish_reason stop)"),
        ((200, completion(None, "length")), "the answer is empty (finish_reason length)"),
        ((200, completion(None, refusal="No.")), "the model refuses: No."),
        ((200, completion("I'm sorry, I can't help.")), "the model refuses: I'm sorry, I can't help."),
        ((200, completion("a", "content_filter")), "the server's content filter has withheld the answer"),
        ((400, {"error": {"message": "unsafe image"}}), "unsafe image"),
    ],
)
def test_an_image_without_a_caption_has_the_reason(answer: tuple[int, dict[str, Any]], detail: str) -> None:
    with chat_server(by_color(answer)) as url:
        first, second = caption(url, [GRAY, RED], concurrency=1)
    assert first == ["a wall"]
    assert isinstance(second, NoCaptions)
    assert detail in second.detail


@contextlib.contextmanager
def endless_server(status: int, pause: float = 0.0) -> Iterator[tuple[str, list[int]]]:
    """The URL of a server whose answers do not end before 256 MiB, and the MiB that it has sent of each."""
    sent: list[int] = []

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            sent.append(0)
            place = len(sent) - 1
            with contextlib.suppress(OSError):
                while sent[place] < 256:
                    self.wfile.write(b" " * (2**20 if not pause else 1))
                    sent[place] += 1
                    time.sleep(pause)

    with serving(Handler) as url:
        yield url, sent


@pytest.mark.parametrize("characters", [100_000, 20_000_000])
def test_an_answer_that_is_too_long_costs_its_caption(characters: int) -> None:
    with chat_server(by_color((200, completion("x" * characters)))) as url:
        first, second = caption(url, [GRAY, RED])
    assert first == ["a wall"]
    text = "has 100,000 characters, above 65,536" if characters == 100_000 else "has more than 1,171,456 bytes"
    assert second.detail == f"the answer {text}"


def test_no_more_of_an_answer_is_read_than_its_bound_also_of_an_error_or_one_that_trickles() -> None:
    with endless_server(200) as (url, sent):
        [row] = caption(url, [GRAY])
        assert row.detail == "the answer has more than 1,171,456 bytes"
        assert sent[0] < 128
    with endless_server(403) as (url, sent), pytest.raises(ValueError, match="rejects a request"):
        caption(url, [GRAY])
    assert sent[0] < 128
    with endless_server(200, pause=0.02) as (url, _), pytest.raises(ServerUnavailable, match="no server has answered"):
        caption(url, [GRAY], wait=0.1, timeout=0.1)


def test_a_request_at_which_a_working_server_fails_costs_its_caption_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teachers.server.captioner.FIRST_PAUSE", 0.01)
    with chat_server(by_color((500, {"error": {"message": "out of memory"}}))) as url:
        first, second = caption(url, [GRAY, RED])
    assert first == ["a wall"]
    assert "answers other requests and fails at this one" in second.detail
    assert "out of memory" in second.detail
    with chat_server(lambda _, request: (200, completion("" if request["seed"] == 1 else f"{request['seed']}"))) as url:
        assert caption(url, [GRAY], captions=3) == [["0", "0", "2"]], "the others of the image fill its place"


def test_requests_are_parallel_within_the_bound_and_spread_over_the_servers_that_work() -> None:
    lock, now, most, served = threading.Lock(), Counter[str](), Counter[str](), Counter[str]()

    def answer_as(name: str) -> Answer:
        def answer(headers: Any, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
            with lock:
                now.update([name, "all"])
                served[name] += 1
                for one in (name, "all"):
                    most[one] = max(most[one], now[one])
            time.sleep(0.03)
            with lock:
                now.subtract([name, "all"])
            return describe(headers, request)

        return answer

    with chat_server(answer_as("a")) as a, chat_server(answer_as("b")) as b:
        down = f"http://127.0.0.1:{free_port()}"
        assert len(caption([down, a, b], [GRAY] * 6, captions=4, concurrency=4)) == 6
    assert most["all"] <= 4
    assert most["a"] >= 2
    assert most["b"] >= 2
    assert served["a"] + served["b"] == 24
    assert min(served["a"], served["b"]) >= 6


def test_a_server_that_stays_down_or_hangs_ends_the_wait_after_its_bound(caplog: pytest.LogCaptureFixture) -> None:
    with chat_server(lambda *_: (time.sleep(1), (200, completion("late")))[1]) as hanging:  # type: ignore[func-returns-value]
        urls = [f"http://127.0.0.1:{free_port()}", hanging]
        with pytest.raises(ServerUnavailable, match=r"no server has answered for \d s .*`wait` allows 0.3.*again"):
            caption(urls, [GRAY], wait=0.3, timeout=0.2)
    assert "captioner vlm: " + urls[0] in caplog.text
    assert "of at most 0.3 s so far" in caplog.text


def test_a_request_that_is_rejected_before_any_answer_is_an_error_of_the_config(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_KEY", "no-name-of-a-secret")
    body = {"error": {"message": "no model tiny for key no-name-of-a-secret"}}
    with (
        chat_server(lambda *_: (404, body)) as url,
        pytest.raises(ValueError, match=r"rejects a request: .*no model tiny for key \(secret\)"),
    ):
        caption(url, [GRAY], api_key_env="MY_KEY")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_of_a_server_is_refused_by_name_and_its_target_gets_no_request(status: int) -> None:
    asked: list[Any] = []

    class Redirecting(QuietHandler):
        def do_POST(self) -> None:
            self.read_body()
            self.answer(status, Location=f"{other}/v1?token=abc")

    with chat_server(lambda *request: (asked.append(request), describe(*request))[1]) as other:  # type: ignore[func-returns-value]
        message = f"rejects a request: .*status {status}, a redirect to '{other}/v1', "
        with serving(Redirecting) as url, pytest.raises(ValueError, match=message):
            caption(url, [GRAY])
    assert asked == []


@pytest.mark.parametrize("status", [302, 400, 401, 403, 404])
def test_servers_that_reject_every_request_after_an_answer_end_the_wait_soon_with_the_status(
    monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr("teachers.server.captioner.REJECTED_SECONDS", 0.2)
    requests = iter(range(100))

    def answer(headers: Any, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return describe(headers, request) if next(requests) < 2 else (status, {"error": {"message": "key expired"}})

    with chat_server(answer) as first, chat_server(answer) as second:
        why = "status 302, a redirect" if status == 302 else f"{status} - key expired"
        with pytest.raises(
            ServerUnavailable, match=rf"every request is rejected \({first}.*{why}.*{second}.*{why}.*key"
        ):
            caption([first, second], [GRAY] * 9, wait=100, concurrency=1)


def test_a_server_that_rejects_every_request_does_not_end_a_run_while_another_answers_or_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("teachers.server.captioner.REJECTED_SECONDS", 0.1)
    monkeypatch.setattr("teachers.server.captioner.FIRST_PAUSE", 0.01)
    requests = iter(range(100))

    def slowly(headers: Any, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        time.sleep(0.05)
        return describe(headers, request)

    def expires(headers: Any, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return describe(headers, request) if next(requests) < 1 else (401, {})

    with chat_server(expires) as expired, chat_server(slowly) as good:
        assert all(len(row) == 1 for row in caption([expired, good], [GRAY] * 12, concurrency=2))
    requests = iter(range(100))
    with chat_server(expires) as expired:
        down = f"http://127.0.0.1:{free_port()}"
        with pytest.raises(
            ServerUnavailable, match=rf"no server has answered .*{expired}.*401.*{down}.*refused.*`wait`"
        ):
            caption([expired, down], [GRAY] * 3, wait=0.5, concurrency=1)


def test_the_fingerprint_covers_what_is_asked_and_not_where() -> None:
    def identity(url: Any = "http://a:1", **options: Any) -> dict[str, Any]:
        return describe_model("vlm", spec_of(url, **options)).identity

    same = {"api_key_env": "K", "concurrency": 2, "timeout": 9.0, "wait": 5.0}
    assert identity() == identity(["https://b/v1", "http://c"], **same)
    assert identity()["repeatable"] is False
    changes: list[dict[str, Any]] = [{"model": "other"}, {"prompt": "Other."}, {"temperature": 0.5}, {"captions": 2}]
    changes += [{"image_size": 64}, {"max_length": 50}, {"options": {"min_p": 0.1}}]
    assert all(identity(**change) != identity() for change in changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": None}, "needs `url`"),
        ({"url": "ftp://a"}, "url must be http://"),
        ({"url": "http://user:pw@a"}, "must not contain a user"),
        ({"prompt": None}, "needs `prompt`"),
        ({"strategy": "beams"}, "strategy beams is not used"),
        ({"min_length": 3}, "min_length: not used"),
        ({"api_key_env": "sk-123"}, "name of an environment variable"),
        ({"options": {"seed": 1}}, "options: seed"),
        ({"family": "transformers"}, "url: used only with family openai"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        describe_model("vlm", spec_of(options.pop("url", "http://a"), **options))


def test_a_missing_package_or_key_is_named_when_the_captioner_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"captioner vlm: the environment variable MY_KEY .* is not set"):
        load_model("vlm", spec_of("http://a", api_key_env="MY_KEY"), "cpu")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r"captioner vlm: .*pip install 'dataset-reinforcement\[server\]'"):
        load_model("vlm", spec_of("http://a"), "cpu")
