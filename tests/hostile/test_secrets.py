"""Credentials in a config are used, but never logged or stored."""

from __future__ import annotations

import http.server
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
import yaml

import reinforce
from reinforce.config import load_config, parse_config
from reinforce.engine.plan.plan import make_plan
from teachers.redact import REDACTED
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.web import serving

PASSWORD, SIGNATURE, TOKEN = "p4ssw0rd-of-eve", "c0ffee-signature", "hf_t0ken-of-eve"


class _Server(http.server.SimpleHTTPRequestHandler):
    """Serves ranges of files to requests with user and signature; files with ``broken`` in their name fail."""

    folder: Path

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        data = (self.folder / path.strip("/")).read_bytes()
        allowed = self.headers.get("Authorization", "").startswith("Basic ") and SIGNATURE in query
        if not allowed or ("broken" in path and self.command == "GET"):
            self.send_error(403 if not allowed else 500)
            return
        begin, end = 0, len(data)
        if found := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, end = int(found[1]), min(end, int(found[2] or end) + 1)
        self.send_response(206 if found else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[begin:end])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    write_tar(tmp_path / "good.tar", members_of(0, 5))
    write_tar(tmp_path / "broken.tar", members_of(1, 5))
    handler = type("Handler", (_Server,), {"folder": tmp_path})
    with serving(handler) as url:
        yield url.removeprefix("http://")


def secretive(address: str, output: Path, **changes: Any) -> dict[str, Any]:
    urls = [f"http://eve:{PASSWORD}@{address}/{name}.tar?X-Amz-Signature={SIGNATURE}" for name in ("good", "broken")]
    options = {"hf_token": TOKEN, "endpoint": f"https://eve:{PASSWORD}@models.example/v1?sig={SIGNATURE}"}
    config = config_of(urls, output, captioners={}, **changes)  # type: ignore[arg-type]
    config["teachers"] = {
        "red": {"class": "tests.helpers.models:ColorTeacher"},
        "chatty": {"class": "tests.helpers.models:TokenLeakingTeacher", "options": options},
    }
    config["failures"] = {"allowed_share": 1.0, "attempts": 1, "outage_seconds": 0.1}
    return config


@pytest.mark.usefixtures("ray_session")
def test_a_run_uses_secrets_but_neither_prints_nor_stores_them(
    address: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "k3y-of-the-environment")
    output = tmp_path / "out"
    with pytest.raises(reinforce.UserError) as ended:  # the broken shard is left for the next run
        reinforce.run(secretive(address, output))
    printed = "".join([*capfd.readouterr(), str(ended.value)])
    assert "so the storage failed for 1 shard" in str(ended.value).lower()
    assert f"500, message='Internal Server Error', url='http://{address}/broken.tar'" in printed
    assert f"https://models.example/v1 does not accept {REDACTED}" in printed

    files = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    files |= {path: path.read_bytes() for path in logs.rglob("*") if path.is_file()}
    assert any(path.name.startswith("worker") for path in files)
    for secret in (PASSWORD, SIGNATURE, TOKEN, "k3y-of-the-environment"):
        assert secret not in printed
        assert [str(path) for path, data in files.items() if secret.encode() in data] == []

    config = yaml.safe_load(next(path for path in files if path.name == "config.yaml").read_text())
    assert config["source"] == [f"http://{address}/{name}.tar" for name in ("good", "broken")]
    assert config["teachers"]["chatty"]["options"] == {"hf_token": REDACTED, "endpoint": "https://models.example/v1"}
    manifest = json.loads((output / "dataset.json").read_text())
    assert manifest["teachers"]["chatty"]["model"]["options"]["hf_token"] == REDACTED
    [samples] = (output / "samples").glob("*.parquet")
    assert pq.read_metadata(samples).metadata[b"reinforce.source"].decode() == f"http://{address}/good.tar"


def test_fingerprints_depend_on_options_but_not_on_secrets(address: str, tmp_path: Path) -> None:
    def fingerprint(**options: str) -> str:
        config = secretive(address, tmp_path / "out")
        config["source"] = "x.tar"
        config["teachers"]["chatty"]["options"] |= options
        return make_plan(parse_config(config)).layers["embeddings/chatty/caption"].fingerprint

    assert fingerprint() == fingerprint(hf_token="another") == fingerprint(endpoint="https://models.example/v1?sig=2")
    assert fingerprint() != fingerprint(endpoint="https://models.example/v2")
    assert fingerprint() != fingerprint(endpoint="https://models.example/v1?version=2")


def test_references_to_urls_that_need_secrets_are_refused(address: str, tmp_path: Path) -> None:
    config = secretive(address, tmp_path / "out", images="reference")
    with pytest.raises(reinforce.UserError, match="give credentials by the environment") as caught:
        reinforce.run(config)
    assert PASSWORD not in str(caught.value)
    assert SIGNATURE not in str(caught.value)


def test_errors_of_configs_and_storages_do_not_quote_secrets(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"source: x\noutput: y\ntoken: {TOKEN}\nteachers: {{a: {{class: [{TOKEN}: }}}}\n")
    messages = []
    for text, overrides in (
        (path.read_text(), []),
        (f"source: {{password: {TOKEN}}}\noutput: y", []),
        (f"source: 'https://eve:{PASSWORD}@h/x.tar'\noutput: y\nseed: 'https://h/x?sig={SIGNATURE}'", []),
        ("source: x\noutput: y", [f"source.deep.token={TOKEN}"]),
        ("source: x\noutput: y", [f"teachers.a.options.token=[{TOKEN}"]),
    ):
        path.write_text(text)
        with pytest.raises(reinforce.UserError) as caught:
            load_config(path, overrides)
        messages.append(str(caught.value))
    with pytest.raises(reinforce.UserError) as caught:
        reinforce.open(f"memory://eve:{PASSWORD}@h/nothing?sig={SIGNATURE}")
    messages.append(str(caught.value))
    for secret in (PASSWORD, SIGNATURE, TOKEN):
        assert not [message for message in messages if secret in message]
