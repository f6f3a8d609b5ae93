from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings

from tests.fuzz.targets import TARGETS
from tests.fuzz.watchdog import bounded

EXAMPLES = {"shard": 60, "packed": 40, "members": 60, "image": 150, "text": 150}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_lost_and_nothing_hangs(name: str) -> None:
    target, strategies = TARGETS[name]

    @settings(max_examples=EXAMPLES[name], deadline=None, derandomize=True)  # `make fuzz` has other cases each time
    @given(**strategies)
    def run(**values: Any) -> None:
        with bounded(60):  # a machine that is shared is slow at times
            target(**values)

    run()
