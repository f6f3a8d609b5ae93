"""How often something is tried, and which error is raised."""

from __future__ import annotations

import pytest

from reinforce.processes.attempts import Attempts


def test_what_passes_is_tried_again_after_its_pauses_and_the_last_error_is_raised() -> None:
    tried: list[int] = []
    waited: list[float] = []

    def fail() -> None:
        tried.append(len(tried))
        raise OSError(len(tried))

    def wait(error: Exception, pause: float) -> None:
        waited.append(pause)

    with pytest.raises(OSError, match="3"):
        Attempts(3, (0.5, 2.0)).call(fail, wait=wait)
    assert (tried, waited) == ([0, 1, 2], [0.5, 2.0])
    with pytest.raises(OSError, match="4"):
        Attempts(3).call(fail, lambda error: error.args != (4,), wait)
    with pytest.raises(OSError, match="5"):
        Attempts(3, within=-1.0).call(fail, wait=wait)
    assert len(waited) == 2
    assert Attempts(5).call(lambda: len(tried), wait=wait) == 5
