"""The switch of fast paths, and the counts of their calls by model."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator

import pytest

from teachers.fast_paths import usage
from teachers.fast_paths.usage import Usage, fast_path, loading, set_enabled, snapshot, total
from teachers.registry import load_model
from teachers.spec import TeacherSpec


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(usage.VARIABLE, raising=False)
    set_enabled(True)
    yield
    set_enabled(True)


def test_fast_paths_are_off_where_the_process_or_the_environment_says_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usage.enabled()
    set_enabled(False)
    assert not usage.enabled()
    monkeypatch.setenv(usage.VARIABLE, "fast")
    assert not usage.enabled()
    set_enabled(True)
    assert usage.enabled()
    monkeypatch.setenv(usage.VARIABLE, "plain")
    assert not usage.enabled()
    monkeypatch.setenv(usage.VARIABLE, "Plain")
    with pytest.raises(ValueError, match=r"REINFORCE_ACCELERATOR is 'Plain' .* set it to plain or fast"):
        usage.enabled()


def test_calls_are_counted_by_the_model_that_was_loaded(caplog: pytest.LogCaptureFixture) -> None:
    with loading("vit"):
        compiled = fast_path("compile", asked=True)
        with loading("inner"):
            fast_path("compile").plain(3)
        held = fast_path("held_weights")
    fast_path("graphs")
    compiled.used()
    compiled.used(4)
    with caplog.at_level(logging.WARNING):
        held.fall_back("its outputs would change")
        held.fall_back("another reason")
    assert caplog.messages == [
        "vit runs without the fast path `held_weights`: its outputs would change",
        "vit runs without the fast path `held_weights`: another reason",
    ]
    found = snapshot()
    assert found == (
        Usage("vit", "compile", asked=True, used=5),
        Usage("inner", "compile", plain=3),
        Usage("vit", "held_weights", reason="its outputs would change"),
        Usage("", "graphs"),
    )
    assert pickle.loads(pickle.dumps(found)) == found
    set_enabled(True)
    assert snapshot() == ()


def test_counts_of_equal_paths_are_summed_over_loads_and_workers() -> None:
    for calls, asked in ((1, False), (2, True)):
        with loading("vit"):
            fast_path("compile", asked).used(calls)
    [one] = snapshot()
    assert one == Usage("vit", "compile", asked=True, used=3)
    other = Usage("vit", "compile", plain=4, reason="no compiler")
    assert total([one, other, Usage("b", "compile")]) == (
        Usage("vit", "compile", asked=True, used=3, plain=4, reason="no compiler"),
        Usage("b", "compile"),
    )


def test_paths_of_a_model_of_the_registry_have_its_name_in_the_config() -> None:
    class Spec(TeacherSpec):
        def load(self, name: str, device: str) -> None:
            fast_path("compile", asked=bool(self.compile)).used()

    load_model("my.teacher", Spec(model="any", compile=True), "cpu")
    fast_path("graphs")
    assert snapshot() == (Usage("my.teacher", "compile", asked=True, used=1), Usage("", "graphs"))
