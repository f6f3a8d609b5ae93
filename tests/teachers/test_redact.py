"""Secrets are recognized by the names of options and in URLs."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from teachers.redact import REDACTED, Redactor, is_secret, redact, redact_values


def test_names_of_secrets_are_recognized_and_those_of_other_options_are_not() -> None:
    secret = [
        "token", "hf_token", "hfToken", "HF_TOKEN", "password", "db_password", "secret", "client-secret", "apiKey",
        "api_key", "AWS_SECRET_ACCESS_KEY", "aws_access_key_id", "account_key",
        "credentials", "SAS_TOKEN", "connection_string",
    ]  # fmt: skip
    others = ["tokens", "max_tokens", "pad_token", "key", "keys", "sort_key", "tokenizer", "width"]
    assert [name for name in (*secret, *others) if is_secret(name)] == secret


PUBLIC_VARIABLES = {
    "PATH": "/opt/conda/envs/clip/bin:/usr/local/bin:/usr/bin",
    "PWD": "/home/erin/project",
    "OLDPWD": "/home/erin/previous",
    "SLURM_JOB_ID": "48151623",
    "GITHUB_SHA": "84d2b1b84d2b1b84d2b1b",
    "SSH_AUTH_SOCK": "/tmp/ssh-Xy12/agent.4711",
    "GPG_KEY": "A035C8C19219BA821ECEA86B64E628F8D684696D",
    "GPG_KEY_ID": "64E628F8D684696D",
    "XDG_SESSION_ID": "c2c2c2",
    "AWS_SHARED_CREDENTIALS_FILE": "/home/erin/.aws/keys",
}
SECRET_VARIABLES = [
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "GITHUB_TOKEN", "WANDB_API_KEY",
    "CI_JOB_TOKEN", "PGPASSWORD", "MYSQL_PWD", "DB_PASSWORD", "AZURE_STORAGE_CONNECTION_STRING",
]  # fmt: skip


def test_only_secret_variables_of_the_environment_are_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        monkeypatch.delenv(name)
    secrets = {name: f"v4lue-of-{number:02d}" for number, name in enumerate(SECRET_VARIABLES)}
    for name, value in {**PUBLIC_VARIABLES, **secrets}.items():
        monkeypatch.setenv(name, value)
    redact_text = Redactor({})
    for name, value in PUBLIC_VARIABLES.items():
        assert redact_text(f"{name}: {value}/data/samples") == f"{name}: {value}/data/samples"
    for name, value in secrets.items():
        assert redact_text(f"{name}: {value}") == f"{name}: {REDACTED}", "not recognised as a secret"


WORDS = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=8, max_size=20)


@given(WORDS, WORDS, WORDS)
def test_urls_in_any_text_lose_their_secrets(user: str, password: str, signature: str) -> None:
    url = f"https://{user}:{password}@host.example/a/b.tar?X-Amz-Signature={signature}&x=1#{password}"
    for text in (url, f"could not get '{url}': 403", f'{{"url": "{url}"}}', f"simplecache::{url}"):
        expected = text.replace(url, "https://host.example/a/b.tar")
        assert redact(text) == expected
        assert Redactor({"source": url})(text) == expected
    bare = f"Max retries exceeded with url: /b.tar?X-Amz-Signature={signature}"  # not a URL
    assert signature not in Redactor({"source": [url]})(bare)
    assert redact_values({"a": [url], "n": 3, "secret": [user]}) == {
        "a": ["https://host.example/a/b.tar"], "n": 3, "secret": REDACTED
    }  # fmt: skip


def test_the_work_for_a_text_does_not_depend_on_the_number_of_secrets() -> None:
    urls = [f"https://host/{n}.tar?X-Amz-Signature={n:064x}&X-Amz-Credential=AKIA{n:08d}" for n in range(2000)]
    few, many = Redactor({"source": urls[:10]}), Redactor({"source": urls})
    text = json.dumps({"event": "shard", "shard": "00000-0123456789", "layers": ["samples"] * 5}) * 3
    assert many(text) == few(text) == text
    assert _calls(many, text) <= _calls(few, text) + 10
    for url in urls:
        assert REDACTED in many(f"error at {url.partition('Signature=')[2]}")


def test_secrets_that_overlap_or_contain_each_other_leave_nothing_of_themselves() -> None:
    redact_text = Redactor({"a": {"token": "abcdefgh"}, "b": {"token": "efghijkl"}, "c": {"token": "abcdefghij"}})
    assert redact_text("x abcdefgh y") == f"x {REDACTED} y"
    assert redact_text("x abcdefghijkl y") == f"x {REDACTED} y"
    assert redact_text("abcdefghabcdefghij") == REDACTED * 2
    assert redact_text("abcdefg efghijkl") == f"abcdefg {REDACTED}"


#: What a URL in a text is, by a pattern whose time is quadratic.
PLAIN_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^\s'\"<>\\]*)")


@given(st.lists(st.sampled_from([*"aZ1+.-:/@?#&= '\"<>\\\n", "\u00e9", "://", "s3", "sig=x", "abfs"])).map("".join))
@example("1://a://b")
@example("-1.a+://u:p@h/x?token=1#2 .b://c@d")
def test_urls_are_found_wherever_the_plain_pattern_finds_them(text: str) -> None:
    def shown(url: re.Match[str]) -> str:
        authority, slash, path = re.split("[?#]", url[2])[0].partition("/")
        return f"{url[1]}://{authority if url[1] == 'abfs' else authority.rpartition('@')[2]}{slash}{path}"

    assert redact(text) == PLAIN_URL.sub(shown, text)
    found = {secret for url in PLAIN_URL.finditer(text) if (secret := redact_values(url[0])) != url[0]}
    assert (redact_values(text) != text) == bool(found)


@pytest.mark.parametrize("unit", ["a", "1", "a1.", "://", "ab ", "http://u:p@h/?a=b "])
@pytest.mark.parametrize("function", [redact, redact_values, Redactor({"token": "abcdefgh"})])
def test_the_work_grows_linearly_with_a_text(function: Callable[[str], str], unit: str) -> None:
    def seconds(characters: int) -> float:
        text = f"https://host/ {unit * (characters // len(unit))}"
        begins = [(time.process_time(), function(text), time.process_time()) for _ in range(5)]
        return min(end - begin for begin, _, end in begins)

    assert seconds(16_000) < 20 * seconds(2_000) + 0.01, "8 times if linear, 64 times if quadratic"


SECRETS = st.text("ABCDEF", min_size=8, max_size=30)


@given(SECRETS, SECRETS, st.lists(st.sampled_from(["x", "xyz", " ", "\n", "1", "{0}", "s3://{1}:{0}@h/p?sig={1}#{0}"])))
def test_a_cut_text_has_both_ends_and_no_part_of_a_secret(user: str, password: str, parts: list[str]) -> None:
    redactor = Redactor({"token": password, "source": f"s3://{user}:{password}@h/p?sig={user}"})
    text = "".join(parts).format(password, user)
    for characters in (10, 31, 64):
        shown = redactor.cut(text, characters)
        assert not re.search("[ABCDEF]", shown)
        if len(text) <= characters:
            assert shown == redactor(text)
    unknown = Redactor({}).cut(text.replace(password, "x").replace(user, "x"), 40)
    assert "s3://x" not in unknown, "the user of a URL that is cut"


def test_the_work_for_a_text_that_is_cut_does_not_depend_on_its_length() -> None:
    redactor = Redactor({"token": "abcdefgh"})
    short, long = ("b" * length + " in file.py" for length in (30_000, 3_000_000))
    assert _calls(redactor.cut, long) <= _calls(redactor.cut, short)
    assert redactor.cut(long).startswith("b" * 10_000)
    assert redactor.cut(long).endswith(" ...  in file.py")


def _calls(function: Callable[[str], str], text: str) -> int:
    """Number of calls, also of C functions, while the function runs."""
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(event) if event in ("call", "c_call") else None)
    try:
        function(text)
    finally:
        sys.setprofile(None)
    return len(calls)
