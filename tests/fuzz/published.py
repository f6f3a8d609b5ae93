"""Published reinforcements with arbitrary data in a member: what is read is valid, the rest is refused."""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path

import fsspec
import numpy as np
from hypothesis import strategies as st

from reinforce.config import parse_config
from reinforce.engine.plan.plan import build_layers, describe_models
from reinforce.labels.members import Unreadable, Wanted
from reinforce.labels.rows import TarLabels
from reinforce.source.samples import Refusal
from tests.fuzz.datasets import json_values
from tests.helpers.published import COUNT, HEIGHT, WIDTH, config_of, published_members, published_sample
from tests.helpers.tars import tar_bytes

CONFIG = parse_config(config_of(Path("x")))
LAYERS = build_layers(CONFIG, describe_models(CONFIG))
CHANGED, WHOLE = published_sample(1), published_sample(2)
_JSON = json_values(st.just([0, 0, 9, 9]))


def _changed_member(name: str, inside_gzip: bool) -> st.SearchStrategy[bytes]:
    """A member with bytes replaced, inserted or removed; ``inside_gzip``: before compression."""
    data = dict(published_members(CHANGED, name if name in ("npz", "pth.gz") else "npz"))[f"{CHANGED.key}.{name}"]
    data = gzip.decompress(data) if inside_gzip else data
    change = st.tuples(st.integers(0, len(data)), st.integers(0, 40), st.binary(max_size=40))
    return (
        st.lists(change, min_size=1, max_size=3)
        .map(lambda changes: _changed(data, changes))
        .map(lambda changed: gzip.compress(changed, 1) if inside_gzip else changed)
    )


def _changed(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for at, count, value in changes:
        data = data[:at] + value + data[at + count :]
    return data


MEMBERS = st.one_of(
    st.tuples(st.just("npz"), _changed_member("npz", False)),
    st.tuples(st.just("pth.gz"), _changed_member("pth.gz", False)),
    st.tuples(st.just("pth.gz"), _changed_member("pth.gz", True)),
    st.tuples(st.just("paug.json"), _changed_member("paug.json", False)),
    st.tuples(st.just("syn.json"), _changed_member("syn.json", False)),
    st.tuples(st.just("paug.json"), _JSON.map(lambda value: json.dumps({"param_aug": [value] * COUNT}).encode())),
    st.tuples(st.just("syn.json"), _JSON.map(lambda value: json.dumps({"syn_text": value}).encode())),
)


def published(member: tuple[str, bytes]) -> None:
    name, data = member
    changed: dict[str, bytes | None] = {"npz": None, name: data} if name == "pth.gz" else {name: data}
    tar = tar_bytes([*published_members(CHANGED, **changed), *published_members(WHOLE)])
    fsspec.filesystem("memory").pipe("/fuzz/dr.tar", tar)
    with contextlib.closing(TarLabels("memory://fuzz/dr.tar", CONFIG, LAYERS.values())) as labels:
        keys = [CHANGED.key, WHOLE.key]
        for key, found in zip(keys, labels.find([Wanted(key, {"uid": key}) for key in keys]), strict=True):
            assert found.key == key
            with contextlib.suppress(Unreadable):
                for record in found.crops(labels.member_reader, WIDTH, HEIGHT):
                    assert 0 <= record.crop.top < record.crop.top + record.crop.height <= HEIGHT
                    assert 0 <= record.crop.left < record.crop.left + record.crop.width <= WIDTH
            for layer, value in found.unpacked(labels.member_reader, key).items():
                kind = LAYERS[layer]
                if isinstance(value, Refusal):
                    assert key == CHANGED.key
                    assert value.detail
                elif isinstance(value, list):
                    assert len(value) == kind.count
                    assert all(isinstance(text, str) for text in value)
                else:
                    assert value.shape == (kind.count, kind.dim)
                    np.testing.assert_allclose(np.linalg.norm(value, axis=1), 1, atol=1e-4)
