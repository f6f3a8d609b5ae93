"""Records of parts that are read by partition, also in an object store that fails."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforce.dataset.shuffle import Shuffle
from reinforce.errors import StorageError
from tests.helpers.s3_proxy import Proxy, refuse

RECORD = np.dtype([("value", "<i8"), ("part", "u1")])


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, 4), max_size=20), max_size=4), st.integers(1, 7))
def test_a_partition_has_its_records_of_all_parts_in_order(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[int]], block: int
) -> None:
    shuffle = Shuffle(str(tmp_path_factory.mktemp("shuffle")), ("stage",), RECORD, 5)
    expected: list[list[tuple[int, int]]] = [[] for _ in range(5)]
    assert shuffle.written() == set()
    for number, partitions in enumerate(map(sorted, parts)):
        records = np.array([(value, number) for value in range(len(partitions))], RECORD)
        shuffle.write(number, np.array(partitions, int), np.split(records, range(block, len(records), block)))
        for partition, record in zip(partitions, records.tolist(), strict=True):
            expected[partition].append(record)
    assert shuffle.written() == {*range(len(parts))}
    assert [shuffle.read(ranges).tolist() for ranges in shuffle.ranges(len(parts))] == expected


def test_records_that_the_storage_refuses_are_an_error_of_the_storage_for_which_a_part_is_tried_again(
    s3: Any, s3_proxy: Proxy
) -> None:
    shuffle = Shuffle("s3://bucket/dataset", ("views", "some", "pairs"), np.dtype("<i8"), 2)
    shuffle.write(0, np.array([0, 0, 1]), [np.arange(3)])
    ranges = shuffle.ranges(1)
    assert [shuffle.read(of_partition).tolist() for of_partition in ranges] == [[0, 1], [2]]
    refused = refuse(403, "AccessDenied")
    with s3_proxy.inject(refused, lambda request: request.is_read), pytest.raises(StorageError) as raised:
        shuffle.read(ranges[0])
    assert "dataset/views/some/pairs/000000.records cannot be read: PermissionError" in str(raised.value)
