"""Secrets are recognized by the names of options and in URLs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teachers.redact import REDACTED, Redactor, is_secret, redact, redact_values


@pytest.mark.parametrize(
    "name",
    ["token", "hf_token", "hfToken", "HF_TOKEN", "password", "db_password", "secret", "client-secret", "apiKey",
     "api_key", "AWS_SECRET_ACCESS_KEY", "aws_access_key_id", "account_key",
     "credentials", "SAS_TOKEN", "connection_string"],
)  # fmt: skip
def test_names_of_secrets_are_recognized(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", ["tokens", "max_tokens", "pad_token", "key", "keys", "sort_key", "tokenizer", "width"])
def test_names_of_other_options_are_not_secret(name: str) -> None:
    assert not is_secret(name)


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
