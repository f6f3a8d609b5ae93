"""The parts of a selection in an object store that fails."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from reinforce.errors import StorageError
from reinforce.selection.parts import Parts
from tests.helpers.s3_proxy import Proxy, refuse


def test_records_that_the_storage_refuses_are_an_error_of_the_storage_for_which_a_part_is_tried_again(
    s3: Any, s3_proxy: Proxy
) -> None:
    parts, records = Parts("s3://bucket/dataset", "some", "0"), np.arange(6)
    parts.save_records("pairs", 0, [records])
    ranges = np.array([[1, 4]])
    assert parts.load_records("pairs", ranges, records.dtype).tolist() == [1, 2, 3]
    refused = refuse(403, "AccessDenied")
    with s3_proxy.inject(refused, lambda request: request.is_read), pytest.raises(StorageError) as raised:
        parts.load_records("pairs", ranges, records.dtype)
    assert "dataset/views/some/parts-0/pairs/000000.records cannot be read: PermissionError" in str(raised.value)
